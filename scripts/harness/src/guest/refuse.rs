//! Refusals: one line on stderr with what failed, why, and the command that fixes it; an exit code for the
//! kind of error; nothing changed; and the next start works.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use super::Boot;
use super::doctor::{diagnose, unusable, unusable_as};
use super::machine::{
    Nic, Role, as_user, bind, has_noiommu_cdev, hidden, is_bound, mounted, moved, need_mode, nodes_of,
    owned_by_nobody, program, rebind_on_drop, set, unbind, with_mode,
};
use super::traffic::{one_port, ports, starts_again};
use crate::case::{Cases, Context, skip};
use crate::process::run;

const ROOT: (&str, &str) = ("root", "");
const NIC: (Nic, Role) = (Nic::E1000e, Role::FwdRx);

fn nic() -> String {
    NIC.0.bdf(NIC.1)
}

/// Checks that l2fwd refuses `arguments` with this exit code and one line that contains `text`. Returns the
/// line without the program's name.
pub(super) fn refused_as(
    context: &Context,
    user: (&str, &str),
    arguments: &str,
    (code, text): (i32, &str),
) -> Result<String> {
    let mut command = as_user(user.0, user.1, &context.program("l2fwd"));
    let ended = run(context, "refused", command.args(arguments.split_whitespace()))?.expect(code)?;
    one_line(&ended.stderr, "vireo-l2fwd", text)
}

/// Checks that standard error is one line that contains `text`. Returns the line without the program's name.
pub(super) fn one_line(stderr: &str, name: &str, text: &str) -> Result<String> {
    ensure!(stderr.lines().count() == 1, "standard error is not one line");
    let line = stderr.trim_end().strip_prefix(&format!("{name}: ")).unwrap_or_default().to_owned();
    ensure!(line.contains(text), "missing: {text}");
    Ok(line)
}

/// Adds a case for each row of a table of exit code, text and arguments. `FORWARDERS` stands for two NICs and
/// `MODE` for a mode that works in this boot.
pub(super) fn refusals(cases: &mut Cases, boot: Boot, table: &'static [(i32, &str, &str)]) {
    for &(code, text, arguments) in table {
        cases.add(format!("refused: {arguments}"), move |context| {
            let pair = ports(Nic::E1000e, Nic::E1000e);
            let arguments = arguments.replace("FORWARDERS", &pair).replace("MODE", boot.generator_mode());
            refused_as(context, ROOT, &arguments, (code, text))?;
            starts_again(context, boot.generator_mode())
        });
    }
}

pub(super) const BAD_ARGUMENTS: &[(i32, &str, &str)] = &[
    (64, "did you mean", "--no-such-argument -- -p 3"),
    (64, "did you mean", "--in-memori -- -p 3"),
    (64, "cannot be used with", "-a 00:0d.0 -b 00:0e.0 -- -p 3"),
    (64, "use cores 0-1", "-l 99 FORWARDERS -- -p 3"),
    (64, "use cores 0-1", "-l 1- FORWARDERS -- -p 3"),
    (64, "the device is given twice", "-a 00:0d.0 -a 00:0d.0 -- -p 3"),
    (64, "known keys: vfio-mode, mrg_rxbuf", "-a 00:0d.0,speed=9 -- -p 3"),
    (64, "only virtio-net supports it", "--vfio-mode MODE -a 00:0d.0,mrg_rxbuf=0 -a 00:0e.0 -- -p 3"),
    (64, "use one of auto, container", "--vfio-mode fast FORWARDERS -- -p 3"),
    (64, "see: vireo-l2fwd --help", "FORWARDERS"),
    (64, "it is not a hexadecimal mask", "FORWARDERS -- -p three"),
    (64, "use -p 3 for all of them", "--vfio-mode MODE FORWARDERS -- -p 0"),
    (64, "use -p 3 for all of them", "--vfio-mode MODE FORWARDERS -- -p 7"),
    (64, "see: vireo-l2fwd --help", "FORWARDERS -- -p 3 -q 99"),
    (64, "is not of the form", "--vfio-mode MODE FORWARDERS -- -p 3 --portmap 0-1"),
    (64, "or leave it out", "-m 1 --vfio-mode MODE FORWARDERS -- -p 3"),
    (64, "without an IOMMU", "-a 00:0d.0,vfio-mode=noiommu -a 00:0e.0,vfio-mode=cdev -- -p 3"),
    (64, "takes at most 9230", "--vfio-mode MODE FORWARDERS -- -p 3 -q 2 --max-pkt-len 9728"),
    (69, "which mrg_rxbuf=1 asks for", "--vfio-mode MODE -a 00:05.0,mrg_rxbuf=0 -- -p 1 --max-pkt-len 9018"),
    (69, "no such PCI device", "-a 00:1e.0 -- -p 1"),
    (69, "no driver supports", "-a 00:02.0 -- -p 1"),
];

pub(super) const WITH_IOMMU: &[(i32, &str, &str)] = &[
    (69, "use --vfio-mode cdev or container", "--vfio-mode noiommu FORWARDERS -- -p 3"),
    (69, "use --vfio-mode cdev or container", "--vfio-mode noiommu-cdev FORWARDERS -- -p 3"),
    (64, "leave --iova-mode out", "--iova-mode pa --vfio-mode cdev FORWARDERS -- -p 3"),
];

pub(super) const WITHOUT_IOMMU: &[(i32, &str, &str)] = &[
    (69, "auto never chooses a no-IOMMU mode", "FORWARDERS -- -p 3"),
    (69, "--vfio-mode noiommu", "--vfio-mode cdev FORWARDERS -- -p 3"),
    (69, "--vfio-mode noiommu", "--vfio-mode container FORWARDERS -- -p 3"),
    (69, "--vfio-mode noiommu", "--vfio-mode compat FORWARDERS -- -p 3"),
    (64, "leave --iova-mode out", "--iova-mode va --vfio-mode noiommu FORWARDERS -- -p 3"),
    (64, "leave --isolate-ports out", "--isolate-ports --vfio-mode noiommu FORWARDERS -- -p 3"),
    (64, "leave --no-huge out", "--no-huge --vfio-mode noiommu FORWARDERS -- -p 3"),
];

/// Adds a case: l2fwd and the doctor refuse a mode that this machine cannot offer, in the same words.
pub(super) fn mode_refused(
    cases: &mut Cases,
    boot: Boot,
    name: String,
    (mode, nic): (&'static str, String),
    text: &'static str,
) {
    cases
        .add(name, move |context| {
            unusable(context, mode, &nic, (69, text))?;
            starts_again(context, boot.generator_mode())
        })
        .on_both_kernels();
}

pub(super) fn bound_to_the_kernel(cases: &mut Cases, boot: Boot, mode: &'static str) {
    cases.add("refused: bound to a kernel driver", move |context| {
        let nic = nic();
        let again = rebind_on_drop(nic.clone());
        bind(&nic, "e1000e")?;
        let text = format!("kernel driver e1000e; run: vireo-devbind --bind vfio-pci {nic}");
        unusable(context, mode, &nic, (69, &text))?;
        ensure!(is_bound(&nic, "e1000e"), "the NIC was taken from e1000e");
        drop(again);
        starts_again(context, boot.generator_mode())
    });
}

/// Adds a case without vfio-pci. Built-in drivers cannot be unloaded, but a mount can cover their directory.
pub(super) fn not_loaded(cases: &mut Cases, boot: Boot) {
    cases.add("refused: vfio-pci is not loaded", move |context| {
        let nic = nic();
        let again = rebind_on_drop(nic.clone());
        unbind(&nic)?;
        let covered = mounted(context, "-t tmpfs", "/sys/bus/pci/drivers".as_ref())?;
        let devbind = program(context, "devbind", &format!("--bind vfio-pci {nic}"))?.expect(69)?;
        one_line(&devbind.stderr, "vireo-devbind", "run: modprobe vfio-pci")?;
        let text =
            format!("vfio-pci is not loaded; run: modprobe vfio-pci && vireo-devbind --bind vfio-pci {nic}");
        unusable(context, "cdev", &nic, (69, &text))?;
        drop(covered);
        drop(again);
        starts_again(context, boot.generator_mode())
    });
}

pub(super) fn missing_nodes(cases: &mut Cases, boot: Boot) {
    for (node, mode, text) in [
        ("/dev/iommu", "cdev", "modprobe iommufd"),
        ("/dev/iommu", "compat", "modprobe iommufd"),
        ("/dev/vfio/vfio", "container", "modprobe vfio-pci"),
        ("/dev/vfio/devices", "cdev", "mkdir -p /dev/vfio/devices && mknod -m 0600 /dev/vfio/devices/vfio"),
    ] {
        cases.add(format!("refused: no {node}, {mode}"), move |context| {
            let hidden = hidden(node)?;
            unusable(context, mode, &nic(), (69, text))?;
            drop(hidden);
            starts_again(context, boot.generator_mode())
        });
    }
}

/// Adds cases in which a device's node is that of another device, as after a wrong mknod.
pub(super) fn wrong_nodes(cases: &mut Cases, boot: Boot) {
    for mode in ["container", "cdev"] {
        cases.add(format!("refused: the node of another device, {mode}"), move |context| {
            let node = |role| if mode == "cdev" { NIC.0.cdev_node(role) } else { NIC.0.group_node(role) };
            let (own, other) = (node(Role::FwdRx)?, node(Role::FwdTx)?);
            let away = moved(&own, Path::new("/dev/vfio.away"))?;
            let swapped = moved(&other, &own)?;
            let line = unusable(context, mode, &nic(), (69, "; run: rm -f /dev/vfio/"))?;
            drop(swapped);
            drop(away);
            let number = std::fs::metadata(&own)?.rdev();
            let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
            let fix = format!("mknod -m 0600 {} c {major} {minor}", own.display());
            ensure!(line.contains(&fix), "missing: {fix}");
            starts_again(context, boot.generator_mode())
        });
    }
}

/// Adds cases: the error for an unprivileged user names the node's owner and a udev rule that grants access.
pub(super) fn permissions(cases: &mut Cases, boot: Boot) {
    let iommufd = || Ok(PathBuf::from("/dev/iommu"));
    let mut add = |name: &str,
                   mode: &'static str,
                   node: fn() -> Result<PathBuf>,
                   open: fn() -> Vec<PathBuf>,
                   rule: &'static str| {
        cases.add(format!("refused: no permission for {name}, {mode}"), move |context| {
            let _mode = with_mode(&open(), 0o666)?;
            let node = node()?;
            let mode_of_node = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&node)?) & 0o777;
            let node = node.display();
            let text = format!(
                "cannot open {node}: EACCES: it belongs to uid 0, gid 0 with mode 0{mode_of_node:o}; run as root, or: \
                 setfacl -m u:nobody:rw {node}; permanently, with a udev rule: {rule}, OWNER=\"nobody\""
            );
            unusable_as(context, ("nobody", ""), mode, &nic(), (77, &text))?;
            starts_again(context, boot.generator_mode())
        });
    };
    add("iommufd", "cdev", iommufd, Vec::new, "KERNEL==\"iommu\"");
    add(
        "a device",
        "cdev",
        || NIC.0.cdev_node(NIC.1),
        || vec!["/dev/iommu".into()],
        "SUBSYSTEM==\"vfio-dev\"",
    );
    add("a group", "container", || NIC.0.group_node(NIC.1), Vec::new, "SUBSYSTEM==\"vfio\"");
}

/// Adds cases: a user who may open the nodes still needs CAP_SYS_RAWIO.
pub(super) fn no_raw_io(cases: &mut Cases, boot: Boot) {
    for mode in ["noiommu", "noiommu-cdev"] {
        cases
            .add(format!("refused: no CAP_SYS_RAWIO, {mode}"), move |context| {
                need_mode(mode)?;
                let _owned = owned_by_nobody(&nodes_of(mode)?)?;
                let text = "CAP_SYS_RAWIO, whatever the node's mode is; start as root";
                unusable_as(context, ("nobody", ""), mode, &nic(), (77, text))?;
                starts_again(context, boot.generator_mode())
            })
            .on_both_kernels();
    }
}

/// Adds a case: with no-IOMMU mode switched off, a NIC that was not bound before can no longer be bound, and
/// is not used in some other way.
pub(super) fn switched_off(cases: &mut Cases, boot: Boot) {
    cases.add("refused: no-IOMMU mode is switched off", move |context| {
        let parameter = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode";
        let nic = nic();
        let _again = rebind_on_drop(nic.clone());
        unbind(&nic)?;
        let off = set(parameter, "0")?;
        let line = program(context, "devbind", &format!("--bind vfio-pci {nic}"))?.expect(69)?.stderr;
        let diagnosis = diagnose(context, ROOT, "noiommu", &nic)?.unwrap_or_default();
        // The doctor must repeat devbind's reason, not recommend running devbind.
        for said in [&line, &diagnosis] {
            let text = format!("echo 1 > {parameter}");
            ensure!(
                said.contains("it is in no IOMMU group") && said.contains(&text),
                "missing: {text}, found: {said}"
            );
        }
        let text = format!("it is bound to no driver; run: vireo-devbind --bind vfio-pci {nic}");
        refused_as(context, ROOT, &format!("--vfio-mode noiommu -a {nic} -- -p 1"), (69, &text))?;
        drop(off);
        program(context, "devbind", &format!("--bind vfio-pci {nic}"))?.expect(0)?;
        starts_again(context, boot.generator_mode())
    });
}

pub(super) fn needs_newer_kernel(cases: &mut Cases, boot: Boot) {
    cases
        .add("refused: noiommu-cdev on a kernel without it", move |context| {
            if has_noiommu_cdev()? {
                return skip("this kernel has noiommu-cdev");
            }
            unusable(context, "noiommu-cdev", &nic(), (69, "7.3"))?;
            starts_again(context, boot.generator_mode())
        })
        .on_both_kernels();
}

/// Adds cases: a process of root uses the NIC, and an unprivileged user cannot see which one.
pub(super) fn hidden_user(cases: &mut Cases) {
    for mode in ["cdev", "container"] {
        cases.add(format!("refused: in use by somebody else, {mode}"), move |context| {
            let _owned = owned_by_nobody(&nodes_of(mode)?)?;
            let l2fwd = one_port(mode).forwarding(context)?;
            let line = unusable_as(context, ("nobody", ""), mode, &nic(), (75, "in use by"))?;
            ensure!(line.contains("find it: fuser -v"), "no command");
            l2fwd.stop()?;
            Ok(())
        });
    }
}

/// Adds a case: a start in mode `second` asks for a NIC that a process in mode `first` uses.
pub(super) fn in_use(cases: &mut Cases, boot: Boot, first: &'static str, second: &'static str) {
    let name = match first == second {
        true => format!("refused: in use, {first}"),
        false => format!("refused: in use by {first}, {second}"),
    };
    cases.add(name, move |context| {
        let l2fwd = one_port(first).forwarding(context)?;
        let pid = l2fwd.process.pid();
        let text = format!("in use by pid {pid} (vireo-l2fwd); stop it: kill {pid}");
        unusable(context, second, &nic(), (75, &text))?;
        l2fwd.stop()?;
        starts_again(context, boot.generator_mode())
    });
}

pub(super) fn same_prefix(cases: &mut Cases, boot: Boot, mode: &'static str) {
    cases.add(format!("refused: same --file-prefix, {mode}"), move |context| {
        let l2fwd = one_port(mode).forwarding(context)?;
        let text =
            format!("in use by pid {} (vireo-l2fwd); start with another --file-prefix", l2fwd.process.pid());
        let other = Nic::E1000e.bdf(Role::FwdTx);
        let arguments = format!("--file-prefix fwd --vfio-mode {mode} -a {other} -- -p 1");
        refused_as(context, ROOT, &arguments, (75, &text))?;
        l2fwd.stop()?;
        starts_again(context, boot.generator_mode())
    });
}
