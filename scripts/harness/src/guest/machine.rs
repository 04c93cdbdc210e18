//! The guest: NICs in the slots of `scripts/lib/topology.sh`, drivers, hugepages, device nodes. Guards undo a
//! case's changes when they are dropped.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use scopeguard::{ScopeGuard, guard};

use crate::case::{Context, read, skip, write};
use crate::process::{Ended, run};

/// Kind of NIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nic {
    VirtioNet,
    /// An 82540EM. It receives nothing for a second after each start and shares its driver with the 82574L,
    /// so most of its cases run with `--full` only.
    E1000,
    /// An 82574L.
    E1000e,
    /// An 82576 behind its own root port. It has its own boots, because it needs a newer QEMU.
    Igb,
}

/// Device number of the first root port.
const FIRST_ROOT_PORT: u8 = 16;

/// Kinds of NIC that are together in one boot.
pub(crate) const NICS: [Nic; 3] = [Nic::VirtioNet, Nic::E1000, Nic::E1000e];

/// Use of a NIC: the generator sends on one and receives on another; the forwarder has the two in between.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Role {
    GenTx,
    FwdRx,
    FwdTx,
    GenRx,
}

impl Nic {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::VirtioNet => "virtio-net",
            Self::E1000 => "e1000",
            Self::E1000e => "e1000e",
            Self::Igb => "igb",
        }
    }

    /// Device number of the NIC, for an igb that of its root port. It is the last byte of the MAC address.
    pub(crate) fn slot(self, role: Role) -> u8 {
        let first = match self {
            Self::VirtioNet => 4,
            Self::E1000 => 8,
            Self::E1000e => 12,
            Self::Igb => FIRST_ROOT_PORT,
        };
        first + role as u8
    }

    pub(crate) fn bdf(self, role: Role) -> String {
        let slot = self.slot(role);
        match self {
            // The buses of the root ports are numbered from 1.
            Self::Igb => format!("0000:{:02x}:00.0", slot - FIRST_ROOT_PORT + 1),
            _ => format!("0000:00:{slot:02x}.0"),
        }
    }

    pub(crate) fn mac(self, role: Role) -> String {
        format!("52:54:00:00:00:{:02x}", self.slot(role))
    }

    /// Node `/dev/vfio/N` of the NIC's group.
    pub(crate) fn group_node(self, role: Role) -> Result<PathBuf> {
        let group = fs::read_link(device(&self.bdf(role)).join("iommu_group"))?;
        Ok(Path::new("/dev/vfio").join(group.file_name().context("the group has no number")?))
    }

    /// Node `/dev/vfio/devices/vfioN` of the NIC.
    pub(crate) fn cdev_node(self, role: Role) -> Result<PathBuf> {
        let mut entries = fs::read_dir(device(&self.bdf(role)).join("vfio-dev"))?;
        Ok(Path::new("/dev/vfio/devices").join(entries.next().context("the NIC has no cdev")??.file_name()))
    }
}

/// Directory of a PCI device in sysfs.
pub(crate) fn device(bdf: &str) -> PathBuf {
    Path::new("/sys/bus/pci/devices").join(bdf)
}

/// Binds a device to a driver.
pub(crate) fn bind(bdf: &str, driver: &str) -> Result<()> {
    let device = device(bdf);
    write(device.join("driver_override"), driver)?;
    unbind(bdf)?;
    write("/sys/bus/pci/drivers_probe", bdf)?;
    ensure!(is_bound(bdf, driver), "{bdf} was not bound to {driver}");
    Ok(())
}

/// Unbinds a device from its driver, if it has one.
pub(crate) fn unbind(bdf: &str) -> Result<()> {
    let unbind = device(bdf).join("driver/unbind");
    if unbind.exists() { write(unbind, bdf) } else { Ok(()) }
}

pub(crate) fn is_bound(bdf: &str, driver: &str) -> bool {
    Path::new("/sys/bus/pci/drivers").join(driver).join(bdf).exists()
}

/// Binds the device to vfio-pci again at the end of the case.
pub(crate) fn rebind_on_drop(bdf: impl Into<String>) -> ScopeGuard<String, fn(String)> {
    let again: fn(String) = |bdf| {
        let _ = bind(&bdf, "vfio-pci");
    };
    guard(bdf.into(), again)
}

const HUGEPAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

pub(crate) fn hugepages(which: &str) -> Result<u64> {
    Ok(read(format!("{HUGEPAGES}/{which}"))?.trim().parse()?)
}

pub(crate) fn set_hugepages(count: u64) -> Result<()> {
    write(format!("{HUGEPAGES}/nr_hugepages"), count.to_string())?;
    ensure!(hugepages("nr_hugepages")? == count, "the kernel has no room for {count} hugepages");
    Ok(())
}

/// Writes `text` to a file of sysfs, and restores the former content at the end of the case.
pub(crate) fn set<P: Into<PathBuf>>(path: P, text: &str) -> Result<impl Drop + use<P>> {
    let path = path.into();
    let before = read(&path)?;
    write(&path, text)?;
    Ok(guard((path, before), |(path, before)| {
        let _ = write(path, before.trim());
    }))
}

/// Hides a node for the rest of the case, or until the guard is dropped.
pub(crate) fn hidden(node: &str) -> Result<impl Drop + use<>> {
    moved(Path::new(node), Path::new(&format!("{node}.away")))
}

/// Renames a node for the rest of the case, or until the guard is dropped.
pub(crate) fn moved(node: &Path, to: &Path) -> Result<impl Drop + use<>> {
    let (node, to) = (node.to_owned(), to.to_owned());
    fs::rename(&node, &to).with_context(|| format!("cannot move {}", node.display()))?;
    Ok(guard((node, to), |(node, to)| {
        let _ = fs::rename(to, node);
    }))
}

/// Makes an unprivileged user the owner of nodes, and root again at the end of the case.
pub(crate) fn owned_by_nobody(nodes: &[PathBuf]) -> Result<impl Drop + use<>> {
    let guard = guard(nodes.to_vec(), |nodes| {
        for node in nodes {
            let _ = chown(node, Some(0), None);
        }
    });
    for node in nodes {
        chown(node, Some(NOBODY), None)?;
    }
    Ok(guard)
}

/// Changes the mode of nodes, and restores the former one at the end of the case.
pub(crate) fn with_mode(nodes: &[PathBuf], mode: u32) -> Result<impl Drop + use<>> {
    let mut before = Vec::new();
    for node in nodes {
        before.push((node.clone(), fs::metadata(node)?.mode() & 0o7777));
    }
    let guard = guard(before, |before| {
        for (node, mode) in before {
            let _ = fs::set_permissions(node, fs::Permissions::from_mode(mode));
        }
    });
    for node in nodes {
        fs::set_permissions(node, fs::Permissions::from_mode(mode))?;
    }
    Ok(guard)
}

/// Removes a file or a directory at the end of the case.
pub(crate) fn removed(path: &str) -> ScopeGuard<PathBuf, impl FnOnce(PathBuf) + use<>> {
    guard(path.into(), |path| {
        let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path));
    })
}

/// Mounts a file system for the rest of the case; `options` are those of mount(8).
pub(crate) fn mounted(context: &Context, options: &str, at: &Path) -> Result<impl Drop + use<>> {
    fs::create_dir_all(at)?;
    let mut command = Command::new("mount");
    command.args(options.split_whitespace()).arg("none").arg(at);
    run(context, "mount", &mut command)?.expect(0)?;
    Ok(guard(at.to_owned(), |at| {
        let _ = Command::new("umount").arg(at).status();
    }))
}

/// Uid and gid of an unprivileged user.
pub(crate) const NOBODY: u32 = 65534;

/// Nodes of groups, without that of the container.
pub(crate) fn group_nodes() -> Result<Vec<PathBuf>> {
    nodes("/dev/vfio", |name| name.chars().all(|c| c.is_ascii_digit()) || name.starts_with("noiommu-"))
}

/// Nodes of devices.
pub(crate) fn cdev_nodes() -> Result<Vec<PathBuf>> {
    nodes("/dev/vfio/devices", |_| true)
}

fn nodes(dir: &str, wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let entry = entry?;
        if wanted(&entry.file_name().to_string_lossy()) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

/// Nodes that a program in `mode` opens, without `/dev/vfio/vfio`.
pub(crate) fn nodes_of(mode: &str) -> Result<Vec<PathBuf>> {
    let iommufd = || vec![PathBuf::from("/dev/iommu")];
    Ok(match mode {
        "container" | "noiommu" => group_nodes()?,
        "compat" => [iommufd(), group_nodes()?].concat(),
        _ => [iommufd(), cdev_nodes()?].concat(),
    })
}

/// Skips a case of mode `noiommu-cdev` on a kernel that has no cdevs for devices without an IOMMU.
pub(crate) fn need_mode(mode: &str) -> Result<()> {
    match mode == "noiommu-cdev" && !has_noiommu_cdev()? {
        true => skip("this kernel has no cdevs for devices without an IOMMU (7.3 has)"),
        false => Ok(()),
    }
}

pub(crate) fn has_noiommu_cdev() -> Result<bool> {
    Ok(cdev_nodes()?.iter().any(|node| node.to_string_lossy().contains("/noiommu-")))
}

/// State of the machine that a program could leave changed.
pub(crate) fn state() -> String {
    let mut lines = Vec::new();
    for driver in fs::read_dir("/sys/bus/pci/drivers").into_iter().flatten().flatten() {
        for entry in fs::read_dir(driver.path()).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with("0000:") {
                lines.push(entry.path().display().to_string());
            }
        }
    }
    for dir in ["/dev/vfio", "/dev/vfio/devices", "/dev/hugepages", "/var/run/vireo"] {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            lines.push(entry.path().display().to_string());
        }
    }
    lines.push(format!("/dev/iommu: {}", Path::new("/dev/iommu").exists()));
    for count in ["nr_hugepages", "free_hugepages"] {
        lines.push(format!("{count}: {}", hugepages(count).unwrap_or_default()));
    }
    lines.sort();
    lines.join("\n")
}

/// Builds a command that runs `program` as `user`. Its arguments must not contain blanks. Root sets `limits`,
/// such as `ulimit -l 64`, and may also raise them.
pub(crate) fn as_user(user: &str, limits: &str, program: &Path) -> Command {
    let exec = match user {
        "root" => "exec \"$@\"".to_owned(),
        _ => format!("exec su {user} -s /bin/sh -c \"exec $*\""),
    };
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("{limits}\n{exec}")).arg("sh").arg(program).env("USER", user);
    command
}

/// Sends `command` to QEMU's monitor, to which `lab run --monitor` gives the guest access.
pub(crate) fn monitor(command: &str) -> Result<()> {
    write(
        port("monitor.in")?.context("the guest has no access to QEMU's monitor (lab --monitor)")?,
        format!("{command}\n"),
    )
}

/// Node of the virtio-serial port `name`, if there is one.
pub(crate) fn port(name: &str) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir("/sys/class/virtio-ports").context("the guest has no virtio-serial ports")? {
        let entry = entry?;
        if read(entry.path().join("name"))?.trim() == name {
            return Ok(Some(Path::new("/dev").join(entry.file_name())));
        }
    }
    Ok(None)
}

/// Runs one of Vireo's programs that ends by itself.
pub(crate) fn program(context: &Context, name: &str, arguments: &str) -> Result<Ended> {
    let mut command = Command::new(context.program(name));
    run(context, name, command.args(arguments.split_whitespace()))
}
