# shellcheck shell=dash
# vireo-doctor beside the truth: what l2fwd does with the same NIC in the same mode, as the same user, on a machine that
# is broken in the same way.

# unusable MODE NIC EXIT-CODE TEXT
unusable() {
    unusable_as root "$@"
    starts_again
}

# unusable_as USER MODE NIC EXIT-CODE TEXT: l2fwd refuses the NIC, and the doctor says what l2fwd said.
unusable_as() {
    local said
    refused_as "$1" "$4" "$5" --file-prefix second --vfio-mode "$2" -a "$3" -- -p 1
    diagnose "$1" "$2" "$3"
    said=$(cat "$WORK/refused.err")
    [ "$DIAGNOSIS" = "${said#vireo-l2fwd: }" ] || die "the doctor says something else: $DIAGNOSIS"
}

# usable MODE NIC: the doctor says so; the caller has l2fwd start on it.
usable() {
    diagnose root "$@"
    [ "$DIAGNOSIS" = usable ] || die "the doctor refuses it: $DIAGNOSIS"
}

# diagnose USER MODE NIC: sets DIAGNOSIS to "usable", or to the reason and the command, as an error has them.
diagnose() {
    local wanted=69 status=0
    if [ "$1" = root ]; then
        timeout "$PATIENCE" doctor --modes "$2" "$3" >"$WORK/doctor.out" 2>"$WORK/doctor.err" || status=$?
    else
        USER=$1 su "$1" -s /bin/sh -c "$LIMIT timeout $PATIENCE doctor --modes $2 $3" >"$WORK/doctor.out" 2>"$WORK/doctor.err" ||
            status=$?
    fi
    DIAGNOSIS=$(sed -n "/^  $2 /,\$p" "$WORK/doctor.out" | sed "\$!N; s/\n  */; /; s/^  $2 *//; s/^no: //")
    [ "$DIAGNOSIS" != usable ] || wanted=0
    [ $status = $wanted ] || die "the doctor exited with $status, not $wanted"
    [ ! -s "$WORK/doctor.err" ] || die "the doctor complained"
}

# all_usable MODE: every Ethernet controller of the machine, in one call.
all_usable() {
    local class nics=0
    for class in /sys/bus/pci/devices/*/class; do
        [ "$(cat "$class")" != 0x020000 ] || nics=$((nics + 1))
    done
    timeout "$PATIENCE" doctor --json --modes "$1" >"$WORK/doctor.out" 2>"$WORK/doctor.err" || die "the doctor exited with $?"
    [ "$(grep -c '"address": ' "$WORK/doctor.out")" = $nics ] || die "not all of $nics NICs"
    [ "$(grep -c '"usable": true' "$WORK/doctor.out")" = $nics ] || die "not all usable"
    starts_again
}

# none_usable: all that it says is no, in every mode, and nothing was touched.
none_usable() {
    local nic status=0
    nic=$(bdf e1000e fwd_rx)
    at_end bind "$nic" vfio-pci
    bind "$nic" e1000e
    timeout "$PATIENCE" doctor --json "$nic" >"$WORK/doctor.out" 2>"$WORK/doctor.err" || status=$?
    [ $status = 69 ] || die "the doctor exited with $status"
    [ "$(grep -c '"usable": false' "$WORK/doctor.out")" = 5 ] || die "not five modes"
    [ -e "/sys/bus/pci/drivers/e1000e/$nic" ] || die "it was taken away from e1000e"
}
