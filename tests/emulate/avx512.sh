#!/usr/bin/env bash
# Runs a program on an emulated processor with AVX-512 (Skylake-X), for machines that have none, and passes on what it
# prints and its exit status. By default the C tests of that variant (a few minutes): make ctest beforehand.
#   tests/emulate/avx512.sh [PROGRAM [ARGUMENT ...]]
# Needs, on Debian: bochs bochsbios vgabios grub-pc-bin grub-common xorriso mtools cpio gcc, and a Linux kernel image:
# KERNEL=/boot/vmlinuz-..., or else Debian's is fetched with apt-get download.
# Bochs 2.7 inserts a wrong byte in vpinsrb from memory to a register above the 15th, which gcc uses to gather bytes that
# are stored side by side: a program compiled with more than -O1 also needs -fno-tree-slp-vectorize to pass.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- build/c/tests avx512
program=$1
shift
work=build/emulate
rm -rf $work/root $work/iso
mkdir -p $work/root/{dev,proc,sys} $work/iso/boot/grub

if [ -z "${KERNEL:-}" ] && ! ls $work/kernel/boot/vmlinuz-* >/dev/null 2>&1; then
    package=$(apt-cache depends --important linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\)$/\1/p')
    (cd $work && rm -f linux-image-*.deb && apt-get download -q "$package" && dpkg -x linux-image-*.deb kernel)
fi
cp "${KERNEL:-$(ls $work/kernel/boot/vmlinuz-* | tail -n 1)}" $work/iso/boot/vmlinuz

# The root file system: the program, the libraries that it names, and an init that runs it.
cp "$program" $work/root/program
{ ldd "$program" 2>/dev/null || true; } | { grep -o '/[^ ]*' || true; } | while read -r library; do
    install -D "$library" "$work/root$library"
done
gcc -O1 -static -Wall -Wextra tests/emulate/init.c -o $work/root/init
(cd $work/root && find . | cpio --quiet -o -H newc | gzip -1) > $work/iso/boot/root.gz

# Bochs 2.7 misstates the size of the compacted state (XSAVEC, XSAVES): without these two the kernel uses AVX-512.
cat > $work/iso/boot/grub/grub.cfg <<END
linux /boot/vmlinuz console=ttyS0 mitigations=off clearcpuid=321,323 quiet panic=-1 -- $*
initrd /boot/root.gz
boot
END
grub-mkrescue -d /usr/lib/grub/i386-pc -o $work/boot.iso $work/iso 2>/dev/null

# A low number of instructions per second makes the waits of the BIOS and the kernel, which go by the clock, short.
cat > $work/bochsrc <<END
cpu: model=corei7_skylake_x, count=1, ips=20000000, reset_on_triple_fault=0
memory: guest=1024, host=1024
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path=$work/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$work/console
display_library: rfb, options="timeout=0"
clock: sync=none
log: $work/log
panic: action=fatal
END
echo c > $work/continue # for builds of Bochs with its debugger
rm -f $work/console
bochs -q -f $work/bochsrc -rc $work/continue </dev/null >$work/screen 2>&1 || true # switching off is a panic to Bochs
tr -d '\r' < $work/console
status=$(tr -d '\r' < $work/console | sed -n 's/^exit status \([0-9]*\)$/\1/p')
grep -q 'avx512 yes' $work/console && exit "${status:-1}"
