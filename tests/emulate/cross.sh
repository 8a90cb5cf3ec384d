#!/usr/bin/env bash
# Compiles the C tests for another processor and runs them, under qemu where this one cannot.
#   tests/emulate/cross.sh aarch64|s390x|i686
# Needs, on Debian: gcc-ARCH-linux-gnu and qemu-user-static, and pip for OpenBLAS's wheel.
set -euo pipefail
cd "$(dirname "$0")/../.."
machine=$1
case $machine in
    # OpenBLAS 0.3.34 has kernels for SME that give wrong products under qemu 7.2: take those for SVE instead.
    aarch64) flags= run="qemu-aarch64-static -L /usr/aarch64-linux-gnu -E OPENBLAS_CORETYPE=ARMV8SVE" ;;
    s390x) flags=-fexcess-precision=fast run="qemu-s390x-static -L /usr/s390x-linux-gnu" ;;
    i686) flags="-msse2 -mfpmath=sse" run="/usr/i686-linux-gnu/lib/ld-linux.so.2 --library-path /usr/i686-linux-gnu/lib" ;;
    *) sed -n 's/^#   /usage: /p' "$0" && exit 2 ;;
esac
work=build/emulate/$machine
mkdir -p "$work"
openblas=$(sed -n "s/.*\"\(scipy-openblas32==[0-9.]*\);.*/\1/p" pyproject.toml)
python3 -m pip download --quiet --no-deps --only-binary=:all: --platform "manylinux_2_28_$machine" --dest "$work" "$openblas"
python3 -m zipfile -e "$work"/scipy_openblas32-*.whl "$work"
blas=$PWD/$work/scipy_openblas32
# shellcheck disable=SC2086,SC2046 # flags and files are words
"$machine-linux-gnu-gcc" -std=c11 -O2 -UNDEBUG -ffp-contract=off $flags -Wall -Wextra -Wpedantic -Werror \
    -DLNS_BLAS_SCIPY=1 -Icsrc -isystem "$blas/include" $(ls tests/c/*.c | grep -v canary) csrc/core/*.c csrc/kernels/*.c \
    -o "$work/tests" -L"$blas/lib" -lscipy_openblas -Wl,-rpath,"$blas/lib" -Wl,--allow-shlib-undefined -pthread -lm
OPENBLAS_NUM_THREADS=1 $run "$work/tests"
