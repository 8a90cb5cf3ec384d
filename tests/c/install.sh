#!/bin/sh
# The engine as a program outside this tree uses it: installed, found by pkg-config, linked as a shared and as a static
# library, from C and from C++. Run by make install-test, which sets MAKE, CC, CXX and PKG_CONFIG.
set -eu
tree=$(cd "$(dirname "$0")/../.." && pwd)
outside=$(mktemp -d)
trap 'rm -rf "$outside"' EXIT
warnings='-Wall -Wextra -Wpedantic -Werror'
export OPENBLAS_NUM_THREADS=1

fail() {
    echo "install.sh: $*" >&2
    exit 1
}

# need PROGRAM PACKAGE: whether there is such a program, at least once its package is installed.
need() {
    command -v "$1" > /dev/null && return
    if test "$(id -u)" = 0 && command -v apt-get > /dev/null; then
        apt-get install --yes --quiet --no-install-recommends "$2" ||
            { apt-get update --quiet && apt-get install --yes --quiet --no-install-recommends "$2"; } || true
    fi
    command -v "$1" > /dev/null
}

# flags PREFIX [--static]: how lineas.pc says that programs are compiled and linked.
flags() {
    if test "$PKG_CONFIG" != none; then
        PKG_CONFIG_PATH=$1/lib/pkgconfig${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH} "$PKG_CONFIG" --cflags --libs ${2:-} lineas
        return
    fi
    pc=$1/lib/pkgconfig/lineas.pc
    eval "$(sed -n 's/^\([a-z]*\)=\(.*\)/\1="\2"/p' "$pc")"
    eval "echo $(sed -n "s/^Cflags: //p; s/^Libs: //p; ${2:+s/^Libs.private: //p}" "$pc" | tr '\n' ' ')"
}

# build PREFIX NAME [--static]: the programs in C and C++, as NAME and NAME++.
build() {
    # shellcheck disable=SC2046 # several words each
    $CC -std=c11 $warnings fit_map.c $(flags "$1" ${3:-}) -o "$2"
    $CXX -std=c++17 $warnings installed.cpp $(flags "$1" ${3:-}) -o "$2++"
}

needs_shared_library() {
    readelf -d "$1" | grep -q 'NEEDED.*\[liblineas\.so\.'
}

if ! need "$PKG_CONFIG" pkg-config; then
    echo 'NO PKG-CONFIG: a few lines of shell read lineas.pc instead'
    PKG_CONFIG=none
fi
need "${CXX%% *}" g++ || fail "no C++ compiler: is the header fit for C++?"

# Straight into a prefix, and staged as for a package: the same files, and no trace of the staging folder.
$MAKE -C "$tree" -s install PREFIX="$outside/shared"
$MAKE -C "$tree" -s install PREFIX=/opt/lineas DESTDIR="$outside/stage"
diff -r --exclude lineas.pc "$outside/shared" "$outside/stage/opt/lineas" || fail 'DESTDIR changes what is installed'
grep -q '^prefix=/opt/lineas$' "$outside/stage/opt/lineas/lib/pkgconfig/lineas.pc" || fail 'lineas.pc has a wrong prefix'
! grep -q "$outside" "$outside/stage/opt/lineas/lib/pkgconfig/lineas.pc" || fail 'lineas.pc names the staging folder'

# The shared library exports what the header declares, and nothing else; nothing is declared without LNS_API.
header=$outside/shared/include/lineas.h
! grep -nE '^[a-z][a-z0-9_ ]*[ *]lns_[a-z0-9_]*\(' "$header" || fail 'declared without LNS_API'
sed -n 's/^LNS_API [^(]*\(lns_[a-z0-9_]*\)(.*/\1/p' "$header" | sort > "$outside/declared"
nm -D --defined-only "$outside/shared/lib/liblineas.so" | sed 's/.* //' | sort > "$outside/exported"
test -s "$outside/declared" && diff "$outside/declared" "$outside/exported" || fail 'exported is not what is declared'

# The static library is tried where there is no shared one.
cp -R "$outside/shared" "$outside/static"
rm "$outside"/static/lib/liblineas.so*
sed "s|$outside/shared|$outside/static|" "$outside/shared/lib/pkgconfig/lineas.pc" \
    > "$outside/static/lib/pkgconfig/lineas.pc"

cp "$tree/examples/fit_map.c" "$tree/tests/c/installed.cpp" "$outside"
cd "$outside"
build "$outside/shared" with_shared
build "$outside/static" with_static --static
for program in with_shared with_shared++; do
    needs_shared_library "$program" || fail "$program is not linked with the shared library"
done
for program in with_static with_static++; do
    ! needs_shared_library "$program" || fail "$program is linked with the shared library"
done
./with_static | diff "$tree/examples/fit_map.txt" -
./with_static++
export LD_LIBRARY_PATH="$outside/shared/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
./with_shared | diff "$tree/examples/fit_map.txt" -
./with_shared++
echo "installed, linked and run: shared and static, from C and C++; $(wc -l < declared) functions exported"
