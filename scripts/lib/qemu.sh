# shellcheck shell=bash
# QEMU's command line. The kernel's console is the serial port and goes to a file. The command's output has
# separate ports, so that the two never mix and a slow emulated UART does not slow the command.

QEMU_ARGS=()

qemu_arguments() {
    local image=$1 run=$2 output=$3 cpu=max threads=
    [[ $ACCEL == tcg ]] || cpu=host
    # With a thread per CPU, QEMU 10.0 lost a timer of the guest in six of ten boots; with one thread, in none of five.
    [[ $ACCEL != tcg || ,$OPT_NICS, != *,igb,* ]] || threads=,thread=single
    QEMU_ARGS=(
        -M 'q35,kernel-irqchip=split' -accel "$ACCEL$threads" -cpu "$cpu" -smp "$OPT_CPUS" -m "$OPT_MEM"
        -nodefaults -no-user-config -no-reboot -display none
        -kernel "$image" -initrd "$run/initrd" -append "$(kernel_command_line "$output")"
        -chardev "$(qemu_console "$run")" -serial chardev:console
    )
    # The IOMMU must precede the devices that it translates for. Its properties are globals so that a later
    # --qemu-arg -global can change them (intremap=off, aw-bits=39).
    [[ -z $OPT_IOMMU ]] || QEMU_ARGS+=(
        -global intel-iommu.intremap=on -global intel-iommu.caching-mode=on -global intel-iommu.device-iotlb=on
        -global intel-iommu.aw-bits=48 -device intel-iommu
    )
    qemu_add_ports "$run" "$output"
    if [[ -n $OPT_SHARE ]]; then
        QEMU_ARGS+=(
            -fsdev "local,id=share,path=$OPT_SHARE,security_model=none,multidevs=remap"
            -device 'virtio-9p-pci,fsdev=share,mount_tag=share,addr=1'
        )
    fi
    QEMU_ARGS+=("${NIC_ARGS[@]}" "${QEMU_EXTRA[@]}")
}

qemu_add_ports() {
    local run=$1
    QEMU_ARGS+=(-device 'virtio-serial-pci,addr=2')
    qemu_add_port "$run" status
    [[ -z $OPT_MONITOR ]] || qemu_add_monitor "$run"
    [[ -z $OPT_HARNESS ]] || qemu_add_harness
    if [[ $2 == terminal ]]; then
        QEMU_ARGS+=(
            -chardev 'stdio,id=terminal,mux=on,signal=off' -mon 'chardev=terminal,mode=readline'
            -device 'virtconsole,chardev=terminal'
        )
    else
        qemu_add_port "$run" stdout
        qemu_add_port "$run" stderr
    fi
}

# The guest writes commands for QEMU's monitor to port monitor.in: its tests take their own links down. A
# named pipe joins the two. The monitor comes first, because it opens the pipe without waiting for the other
# end.
qemu_add_monitor() {
    mkfifo "$1/monitor.in"
    : >"$1/monitor.out"
    QEMU_ARGS+=(-chardev "pipe,id=monitor,path=$1/monitor" -mon 'chardev=monitor,mode=readline')
    qemu_add_port "$1" monitor.in
}

# With --harness the console is a socket, because the harness writes to the console of a guest that hangs.
qemu_console() {
    if [[ -n $OPT_HARNESS ]]; then
        echo "socket,id=console,path=$OPT_HARNESS/console,server=on,wait=off,logfile=$OPT_HARNESS/console.log"
    else
        echo "file,id=console,path=$1/console"
    fi
}

qemu_add_harness() {
    QEMU_ARGS+=(
        -chardev "socket,id=harness,path=$OPT_HARNESS/harness,server=on,wait=off"
        -device 'virtserialport,chardev=harness,name=harness'
        -chardev "socket,id=commands,path=$OPT_HARNESS/monitor,server=on,wait=off" -mon 'chardev=commands,mode=control'
    )
}

# scripts/guest/init finds a port by its name.
qemu_add_port() {
    QEMU_ARGS+=(-chardev "file,id=$2,path=$1/$2" -device "virtserialport,chardev=$2,name=$2")
}

kernel_command_line() {
    # On a busy host, software emulation is too slow for the kernel's timer check, and the kernel would panic
    # without no_timer_check. After an oops, whatever waits for the killed task would wait until the time limit.
    local words=(console=ttyS0 earlyprintk=ttyS0 oops=panic panic=-1 no_timer_check "vireo.output=$1")
    [[ -n $OPT_VERBOSE ]] || words+=(quiet)
    ((OPT_HUGEPAGES == 0)) || words+=("hugepages=$OPT_HUGEPAGES")
    [[ -z $OPT_BIND ]] || words+=(vireo.bind=1)
    [[ -z $OPT_SHARE ]] || words+=(vireo.share=1)
    [[ -z $OPT_COVERAGE ]] || words+=(vireo.coverage=1)
    if [[ -n $OPT_IOMMU ]]; then
        words+=(intel_iommu=on)
    else
        words+=(vfio.enable_unsafe_noiommu_mode=1)
    fi
    if [[ $1 == terminal ]]; then
        local size
        size=$(stty size)
        words+=("vireo.rows=${size% *}" "vireo.columns=${size#* }" "vireo.term=${TERM:-linux}")
    fi
    echo "${words[*]} ${KERNEL_EXTRA[*]}"
}
