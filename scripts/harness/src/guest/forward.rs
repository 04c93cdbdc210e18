//! Forwarding: one test body for all modes, NICs and arguments.

use anyhow::{Result, ensure};

use super::Boot;
use super::doctor::usable;
use super::machine::{Nic, Role, hidden, need_mode};
use super::traffic::{forwarder, forwards, forwards_as, ports, stream};
use crate::case::{Cases, Context};
use crate::l2fwd::Start;
use crate::pktgen::Stream;

/// Adds a case for each kind of NIC in each mode, and for pairs of different kinds.
pub(super) fn each_nic_in_each_mode(cases: &mut Cases, boot: Boot, modes: &[&'static str]) {
    for &mode in modes {
        for &nic in boot.nics() {
            let case = cases.add(format!("{}, {mode}", nic.name()), move |context| {
                in_mode(context, boot, mode, nic, nic)
            });
            // Covers each mode on the other kernel. Drivers do not depend on the kernel, so what two of them
            // show also holds for e1000e and igb.
            if matches!(nic, Nic::VirtioNet | Nic::E1000) {
                case.on_both_kernels();
            }
        }
        let pairs = [(Nic::VirtioNet, Nic::E1000), (Nic::VirtioNet, Nic::E1000e), (Nic::E1000, Nic::E1000e)];
        for (rx, tx) in pairs.into_iter().filter(|pair| are_in(boot, *pair)) {
            cases.add(format!("{} to {}, {mode}", rx.name(), tx.name()), move |context| {
                in_mode(context, boot, mode, rx, tx)
            });
        }
    }
}

/// Whether the boot has both kinds of NIC.
fn are_in(boot: Boot, (rx, tx): (Nic, Nic)) -> bool {
    boot.nics().contains(&rx) && boot.nics().contains(&tx)
}

/// Forwards between two NICs in `mode`. If both are of the same kind, the doctor must call the mode usable
/// first.
pub(super) fn in_mode(context: &Context, boot: Boot, mode: &str, rx: Nic, tx: Nic) -> Result<()> {
    need_mode(mode)?;
    if rx == tx {
        usable(context, mode, &rx.bdf(Role::FwdRx))?;
    }
    let ended = forwards(context, boot.generator_mode(), &forwarder(mode, rx, tx), rx, tx)?;
    ended.opened(0, mode, "as requested")?;
    ended.opened(1, mode, "as requested")?;
    // Both lanes are on one lcore, which ties them if they are of one pair of drivers.
    let has_e1000_driver = |nic| matches!(nic, Nic::E1000 | Nic::E1000e);
    let can_tie = rx == tx || has_e1000_driver(rx) && has_e1000_driver(tx);
    let is_tied = ended.counter(0, "rx_tied")? > 0;
    ensure!(is_tied == can_tie, "port 0 was {}tied", if is_tied { "" } else { "never " });
    Ok(())
}

/// Adds cases with the two ports of one process in different modes.
pub(super) fn mixed_modes(cases: &mut Cases, boot: Boot, first: &'static str, second: &'static str) {
    let pairs = boot.nics().iter().map(|nic| (*nic, *nic)).chain([(Nic::VirtioNet, Nic::E1000e)]);
    for (rx, tx) in pairs.filter(|pair| are_in(boot, *pair)) {
        let name = match rx == tx {
            true => format!("{}, port 0 {first} and port 1 {second}", rx.name()),
            false => format!("{} {first} and {} {second}", rx.name(), tx.name()),
        };
        cases
            .add(name, move |context| {
                need_mode(first)?;
                need_mode(second)?;
                let start = Start::new(format!(
                    "-l 1 -a {},vfio-mode={first} -a {},vfio-mode={second} -- -p 3 -q 2 -T 0",
                    rx.bdf(Role::FwdRx),
                    tx.bdf(Role::FwdTx)
                ));
                let ended = forwards(context, boot.generator_mode(), &start, rx, tx)?;
                ended.opened(0, first, "as requested")?;
                ended.opened(1, second, "as requested")
            })
            .in_full_if(rx == Nic::E1000);
    }
}

/// Other variations of the packet path: name, NICs, their devargs, EAL and l2fwd arguments.
#[rustfmt::skip]
const VARIANTS: [(&str, Nic, Nic, &str, &str, &str, &str); 13] = [
    ("virtio-net without mergeable buffers", Nic::VirtioNet, Nic::VirtioNet, ",mrg_rxbuf=0", ",mrg_rxbuf=0", "-l 1", "-q 2"),
    ("virtio-net, mergeable to not mergeable", Nic::VirtioNet, Nic::VirtioNet, ",mrg_rxbuf=1", ",mrg_rxbuf=0", "-l 1", "-q 2"),
    ("--in-memory", Nic::E1000e, Nic::E1000e, "", "", "-l 1 --in-memory", "-q 2"),
    ("--huge-dir", Nic::E1000, Nic::E1000, "", "", "-l 1 --huge-dir /dev/hugepages", "-q 2"),
    ("-m", Nic::E1000e, Nic::E1000e, "", "", "-l 1 -m 64", "-q 2"),
    ("two lcores, virtio-net", Nic::VirtioNet, Nic::VirtioNet, "", "", "-l 0-1", "-q 1"),
    ("two lcores, e1000", Nic::E1000, Nic::E1000, "", "", "-l 0-1", "-q 1"),
    ("two lcores, e1000e", Nic::E1000e, Nic::E1000e, "", "", "-l 0-1", "-q 1"),
    ("two lcores, igb", Nic::Igb, Nic::Igb, "", "", "-l 0-1", "-q 1"),
    ("promiscuous, virtio-net", Nic::VirtioNet, Nic::VirtioNet, "", "", "-l 1", "-q 2 -P"),
    ("promiscuous, e1000e", Nic::E1000e, Nic::E1000e, "", "", "-l 1", "-q 2 -P"),
    ("promiscuous, igb", Nic::Igb, Nic::Igb, "", "", "-l 1", "-q 2 -P"),
    ("ports paired by --portmap", Nic::VirtioNet, Nic::E1000e, "", "", "-l 1", "-q 2 --portmap (1,0)"),
];

pub(super) fn variants(cases: &mut Cases, boot: Boot, mode: &'static str) {
    let in_boot = VARIANTS.into_iter().filter(|(_, rx, tx, ..)| are_in(boot, (*rx, *tx)));
    for (name, rx, tx, rx_devargs, tx_devargs, eal, app) in in_boot {
        cases
            .add(format!("{name}, {mode}"), move |context| {
                let start = Start::new(format!(
                    "{eal} --vfio-mode {mode} -a {}{rx_devargs} -a {}{tx_devargs} -- -p 3 -T 0 {app}",
                    rx.bdf(Role::FwdRx),
                    tx.bdf(Role::FwdTx)
                ));
                forwards(context, boot.generator_mode(), &start, rx, tx).map(drop)
            })
            .in_full_if(rx == Nic::E1000);
    }
}

pub(super) fn small_pages(cases: &mut Cases, boot: Boot) {
    for (mode, rx, tx) in [("container", Nic::VirtioNet, Nic::E1000), ("cdev", Nic::E1000e, Nic::E1000e)] {
        cases.add(format!("--no-huge, {mode}"), move |context| {
            let start =
                Start::new(format!("-l 1 --no-huge --vfio-mode {mode} {} -- -p 3 -q 2 -T 0", ports(rx, tx)));
            forwards(context, boot.generator_mode(), &start, rx, tx).map(drop)
        });
    }
}

/// Adds cases for names that select another mode: `group` and `auto`.
pub(super) fn chosen_modes(cases: &mut Cases, boot: Boot) {
    let nic = Nic::E1000e;
    let automatic = Start::new(format!("-l 1 {} -- -p 3 -q 2 -T 0", ports(nic, nic)));
    let (cdev, container) = (automatic.clone(), automatic);
    cases.add("group is container", move |context| {
        let ended = forwards(context, boot.generator_mode(), &forwarder("group", nic, nic), nic, nic)?;
        ended.opened(0, "container", "as requested")
    });
    cases
        .add("auto is cdev", move |context| {
            forwards(context, boot.generator_mode(), &cdev, nic, nic)?.opened(0, "cdev", "auto")
        })
        .on_both_kernels();
    cases.add("auto without /dev/iommu is container", move |context| {
        let _hidden = hidden("/dev/iommu")?;
        let ended = forwards(context, boot.generator_mode(), &container, nic, nic)?;
        ended.opened(0, "container", "there is no /dev/iommu")
    });
}

/// Adds cases with frames of 60 to 9000 bytes, which are several packets in l2fwd, in both directions and
/// between NICs that split them differently.
pub(super) fn long_frames(cases: &mut Cases, boot: Boot, mode: &'static str) {
    let pairs = [
        (Nic::VirtioNet, Nic::VirtioNet),
        (Nic::VirtioNet, Nic::E1000),
        (Nic::VirtioNet, Nic::E1000e),
        (Nic::E1000e, Nic::E1000e),
        (Nic::Igb, Nic::Igb),
    ];
    for (rx, tx) in pairs.into_iter().filter(|pair| are_in(boot, *pair)) {
        let name = format!("frames of up to 9000 bytes, {} to {}, {mode}", rx.name(), tx.name());
        cases.add(name, move |context| {
            let start = Start::new(format!(
                "-l 1 --vfio-mode {mode} {} -- -p 3 -q 2 -T 0 --max-pkt-len 9018",
                ports(rx, tx)
            ));
            // A frame from an e1000 is nine packets, and a TX ring of QEMU's virtio-net holds 256 packets.
            forwards_as(context, boot.generator_mode(), &start, rx, tx, "--size 60-9000 --window 24")
                .map(drop)
        });
    }
}

/// Adds cases: frames to another address pass only with `-P`.
pub(super) fn address_filter(cases: &mut Cases, boot: Boot, mode: &'static str) {
    const FRAMES: u64 = 100;
    for &nic in boot.nics() {
        for (name, flag, expected) in
            [("ignores frames to others", "", 0), ("takes them with -P", "-P", FRAMES)]
        {
            cases
                .add(format!("{} {name}, {mode}", nic.name()), move |context| {
                    let arguments =
                        format!("-l 1 --vfio-mode {mode} {} -- -p 3 -q 2 -T 0 {flag}", ports(nic, nic));
                    let l2fwd = Start::new(arguments).forwarding(context)?;
                    let to_others = format!("--dst-mac 52:54:00:00:00:99 --count {FRAMES}");
                    let Stream { complete, figures } =
                        stream(context, boot.generator_mode(), nic, nic, &to_others)?;
                    ensure!(complete == (expected == FRAMES), "pktgen's exit code is wrong");
                    Stream { complete, figures }.came_back(FRAMES, expected)?;
                    l2fwd.stop()?.counted(0, 0, expected)
                })
                .in_full_if(nic == Nic::E1000);
        }
    }
}
