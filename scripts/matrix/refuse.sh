# shellcheck shell=dash
# What cannot work is refused: one line on stderr with what, why and the command that mends it, an exit code of its
# own, nothing changed, and the next start works.

# refuses EXIT-CODE TEXT ARGUMENTS...
refuses() {
    refused_as root "$@"
    starts_again
}

# refused_as USER EXIT-CODE TEXT ARGUMENTS...
refused_as() {
    local user=$1 wanted=$2 text=$3 status=0
    shift 3
    if [ "$user" = root ]; then
        timeout "$PATIENCE" l2fwd "$@" >"$WORK/refused.out" 2>"$WORK/refused.err" || status=$?
    else
        USER=$user su "$user" -s /bin/sh -c "$LIMIT timeout $PATIENCE l2fwd $*" >"$WORK/refused.out" 2>"$WORK/refused.err" ||
            status=$?
    fi
    [ $status = "$wanted" ] || die "exit code $status, not $wanted"
    [ "$(wc -l <"$WORK/refused.err")" = 1 ] || die "not one line on stderr"
    case $(cat "$WORK/refused.err") in
        "vireo-l2fwd: "*"$text"*) ;;
        *) die "not said: $text" ;;
    esac
}

starts_again() {
    start_l2fwd -l 1 --vfio-mode "$GENERATOR_MODE" -a "$(bdf e1000e fwd_rx)" -a "$(bdf e1000e fwd_tx)" -- -p 3 -q 2 -T 0
    stop_l2fwd
}

# refusals: reads a table of EXIT-CODE|TEXT|ARGUMENTS; in ARGUMENTS, FORWARDERS stands for two NICs and MODE for a mode
# that works in this boot.
refusals() {
    local code text arguments pair
    pair="-a $(bdf e1000e fwd_rx) -a $(bdf e1000e fwd_tx)"
    while IFS='|' read -r code text arguments; do
        # shellcheck disable=SC2046  # words of a command line
        test_case "refused: $arguments" refuses "$code" "$text" $(echo "$arguments" | sed "s/FORWARDERS/$pair/; s/MODE/$GENERATOR_MODE/")
    done
}

bad_arguments() {
    refusals <<'TABLE'
64|did you mean|--no-such-argument -- -p 3
64|did you mean|--in-memori -- -p 3
64|cannot be used with|-a 00:0d.0 -b 00:0e.0 -- -p 3
64|use cores 0-1|-l 99 FORWARDERS -- -p 3
64|use cores 0-1|-l 1- FORWARDERS -- -p 3
64|the device is given twice|-a 00:0d.0 -a 00:0d.0 -- -p 3
64|known keys: vfio-mode, mrg_rxbuf|-a 00:0d.0,speed=9 -- -p 3
64|only virtio-net knows it|--vfio-mode MODE -a 00:0d.0,mrg_rxbuf=0 -a 00:0e.0 -- -p 3
64|use one of auto, container|--vfio-mode fast FORWARDERS -- -p 3
64|see: l2fwd --help|FORWARDERS
64|it is no hexadecimal mask|FORWARDERS -- -p three
64|for all of them give -p 3|--vfio-mode MODE FORWARDERS -- -p 0
64|for all of them give -p 3|--vfio-mode MODE FORWARDERS -- -p 7
64|see: l2fwd --help|FORWARDERS -- -p 3 -q 99
64|is not of the form|--vfio-mode MODE FORWARDERS -- -p 3 --portmap 0-1
64|or leave it out|-m 1 --vfio-mode MODE FORWARDERS -- -p 3
64|without an IOMMU|-a 00:0d.0,vfio-mode=noiommu -a 00:0e.0,vfio-mode=cdev -- -p 3
69|no such PCI device|-a 00:1e.0 -- -p 1
69|no driver here knows|-a 00:02.0 -- -p 1
TABLE
}

# bound_to_the_kernel MODE
bound_to_the_kernel() {
    local nic
    nic=$(bdf e1000e fwd_rx)
    at_end bind "$nic" vfio-pci
    bind "$nic" e1000e
    unusable_as root "$1" "$nic" 69 "kernel driver e1000e; run: vireo-devbind --bind vfio-pci $nic"
    [ -e "/sys/bus/pci/drivers/e1000e/$nic" ] || die "it was taken away from e1000e"
    bind "$nic" vfio-pci
    starts_again
}

# without_node NODE MODE TEXT
without_node() {
    local node=$1
    at_end "[ -e '$node' ] || mv '$node.away' '$node'"
    mv "$node" "$node.away"
    unusable_as root "$2" "$(bdf e1000e fwd_rx)" 69 "$3"
    mv "$node.away" "$node"
    starts_again
}

# no_permission MODE NODE RULE: an ordinary user is told whose the node is and what a udev rule would say.
no_permission() {
    LIMIT='' unusable_as nobody "$1" "$(bdf e1000e fwd_rx)" 77 \
        "cannot open $2: EACCES: it belongs to uid 0, gid 0 with mode $(stat -c 0%a "$2"); run as root, or: setfacl -m u:nobody:rw $2; for good by a udev rule: $3, OWNER=\"nobody\""
    starts_again
}

# no_raw_io MODE NODES...: who may open the nodes still needs the capability.
no_raw_io() {
    local mode=$1
    [ "$mode" != noiommu-cdev ] || need_noiommu_cdev
    shift
    at_end chown root "$@"
    chown nobody "$@"
    LIMIT='' unusable_as nobody "$mode" "$(bdf e1000e fwd_rx)" 77 "CAP_SYS_RAWIO, whatever the node's mode is; start as root"
    starts_again
}

# noiommu_switched_off: a NIC that was not bound before cannot be bound any more, and is not used some other way.
noiommu_switched_off() {
    local nic status=0 parameter=/sys/module/vfio/parameters/enable_unsafe_noiommu_mode
    nic=$(bdf e1000e fwd_rx)
    at_end bind "$nic" vfio-pci
    at_end "echo 1 >$parameter"
    echo "$nic" >"/sys/bus/pci/devices/$nic/driver/unbind"
    echo 0 >$parameter
    devbind --bind vfio-pci "$nic" 2>"$WORK/refused.err" || status=$?
    [ $status = 69 ] || die "devbind exited with $status"
    grep -q "it is in no IOMMU group.*echo 1 > $parameter" "$WORK/refused.err" || die "not said"
    # What devbind says, and not that it is devbind that helps.
    diagnose root noiommu "$nic"
    case $DIAGNOSIS in
        *"it is in no IOMMU group"*"echo 1 > $parameter"*) ;;
        *) die "the doctor says something else: $DIAGNOSIS" ;;
    esac
    refused_as root 69 "it is bound to no driver; run: vireo-devbind --bind vfio-pci $nic" --vfio-mode noiommu -a "$nic" -- -p 1
    echo 1 >$parameter
    devbind --bind vfio-pci "$nic"
    starts_again
}

# not_loaded: drivers that are built in cannot go, but their directory can be covered.
not_loaded() {
    local nic status=0
    nic=$(bdf e1000e fwd_rx)
    at_end bind "$nic" vfio-pci
    echo "$nic" >"/sys/bus/pci/devices/$nic/driver/unbind"
    mount -t tmpfs none /sys/bus/pci/drivers
    devbind --bind vfio-pci "$nic" 2>"$WORK/devbind.err" || status=$?
    l2fwd -a "$nic" -- -p 1 2>"$WORK/refused.err" || status=$status,$?
    diagnose root cdev "$nic"
    umount /sys/bus/pci/drivers
    [ $status = 69,69 ] || die "exit codes $status"
    grep -q 'run: modprobe vfio-pci$' "$WORK/devbind.err" || die "devbind did not say what to load"
    grep -q "vfio-pci is not loaded; run: modprobe vfio-pci && vireo-devbind --bind vfio-pci $nic" "$WORK/refused.err" || die "not said"
    [ "vireo-l2fwd: $DIAGNOSIS" = "$(cat "$WORK/refused.err")" ] || die "the doctor says something else: $DIAGNOSIS"
    bind "$nic" vfio-pci
    starts_again
}

# hidden_user MODE NODES...: a user who cannot see that it is root who has the NIC.
hidden_user() {
    local nic mode=$1
    shift
    nic=$(bdf e1000e fwd_rx)
    at_end chown root "$@"
    chown nobody "$@"
    start_l2fwd -l 1 --vfio-mode "$mode" -a "$nic" -- -p 1 -T 0
    LIMIT='' unusable_as nobody "$mode" "$nic" 75 'in use by'
    grep -q 'find it: fuser -v' "$WORK/refused.err" || die "no command"
    stop_l2fwd
}

# in_use MODE MODE: the second mode asks for what the first one has.
in_use() {
    local nic
    nic=$(bdf e1000e fwd_rx)
    start_l2fwd -l 1 --vfio-mode "$1" -a "$nic" -- -p 1 -T 0
    unusable_as root "$2" "$nic" 75 "in use by pid $L2FWD (l2fwd); stop it: kill $L2FWD"
    stop_l2fwd
    starts_again
}

same_prefix() {
    start_l2fwd -l 1 --vfio-mode "$1" -a "$(bdf e1000e fwd_rx)" -- -p 1 -T 0
    refused_as root 75 "in use by pid $L2FWD (l2fwd); start with another --file-prefix" --file-prefix fwd \
        --vfio-mode "$1" -a "$(bdf e1000e fwd_tx)" -- -p 1
    stop_l2fwd
    starts_again
}
