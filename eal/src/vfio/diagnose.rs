//! Diagnoses errors: from an errno to the reason and the command that fixes it. Apart from `holder`, nothing
//! here runs unless something failed.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};
use vireo_vfio::NOIOMMU_PREFIX;

use super::acquire::{BusDevice, cdev_name, group_of};
use crate::error::{Error, ErrorKind};
use crate::iommufd::Accounting;

const PROC: &str = "/proc";

/// Explains why a pin was refused: what is needed, what the limit is and whose it is.
pub(super) fn memlock(error: Error, len: usize, whose: Accounting) -> Error {
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((soft, _)) if soft != u64::MAX => beyond(error, len.div_ceil(1024) as u64, soft / 1024, whose),
        _ => error,
    }
}

/// Explains that locking `need` more KiB exceeds `limit`.
fn beyond(error: Error, need: u64, limit: u64, whose: Accounting) -> Error {
    let (available, total) = match whose {
        Accounting::PerProcess => {
            let locked = locked_kib().unwrap_or(0);
            // If the limit is not exceeded, it is not the reason, and the suggested command would lower it.
            if locked + need <= limit {
                return error;
            }
            (format!("{limit} KiB for this process, which has {locked} KiB locked"), locked + need)
        }
        // The kernel does not report how much the user has locked already. It is at most the limit.
        Accounting::PerUser => (format!("{limit} KiB for all processes of this user together"), limit + need),
    };
    error
        .because(format!("{need} KiB must be locked and RLIMIT_MEMLOCK is {available}"))
        .with_hint(format!("run: ulimit -l {total}, or as root: prlimit --memlock=unlimited -- COMMAND"))
        .with_kind(ErrorKind::Os)
}

/// KiB that the process has locked already, which type1 counts (`Documentation/filesystems/proc.rst`).
fn locked_kib() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// Explains that the container accepts no further mapping, however small.
pub(super) fn entry_limit(error: Error) -> Error {
    const PARAMETER: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
    let limit: u32 =
        fs::read_to_string(PARAMETER).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(65535);
    error
        .because(format!("the container has as many mappings as dma_entry_limit allows, {limit}"))
        .with_hint(format!("run: echo {} > {PARAMETER}; or choose --vfio-mode cdev", more_entries(limit)))
        .with_kind(ErrorKind::Os)
}

/// Returns a limit above `limit`: the kernel's default or twice `limit`, whichever is larger.
fn more_entries(limit: u32) -> u32 {
    limit.saturating_mul(2).max(65535)
}

/// Explains why a node did not open although its owner and mode would allow it.
pub(super) fn forbidden(error: Error, path: &Path) -> Error {
    let physical = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(NOIOMMU_PREFIX));
    match error.errno() {
        Some(Errno::EPERM) if physical => raw_io(error),
        Some(Errno::EPERM) => {
            error.because("the device cgroup of this container or service forbids it").with_hint(format!(
                "start the container with --device {path}, or the service with DeviceAllow={path} rw",
                path = path.display()
            ))
        }
        _ => error,
    }
}

/// Explains that the kernel requires a capability for a device without an IOMMU.
pub(super) fn raw_io(error: Error) -> Error {
    error
        .because("devices without an IOMMU require CAP_SYS_RAWIO, whatever the node's mode is")
        .with_hint("start as root, and drop privileges with --user")
}

/// Explains why a group node did not open: it can be opened only once, and not while its devices are open as
/// cdevs.
pub(super) fn group_open(error: Error, device: &BusDevice, dev: &Path) -> Error {
    match error.errno() {
        Some(Errno::EBUSY) => group_busy(error, device, dev),
        Some(Errno::ENOENT) => error
            .because("no device of the group is bound to vfio-pci")
            .with_hint("bind every device of the group to vfio-pci"),
        _ => error,
    }
}

/// Explains why a group is busy. A group is open through its own node or through the cdevs of its devices,
/// never both.
fn group_busy(error: Error, device: &BusDevice, dev: &Path) -> Error {
    let Ok(group) = group_of(device) else { return in_use(error, &[]) };
    let own = cdev_path(device, dev);
    let mut paths = ["", NOIOMMU_PREFIX].map(|kind| dev.join(format!("vfio/{kind}{group}"))).to_vec();
    paths.extend(
        members(device)
            .filter_map(|member| cdev_path(&member, dev))
            .filter(|path| Some(path) != own.as_ref()),
    );
    let here = holds(Path::new("/proc/self"), &paths);
    paths.extend(own);
    if !here || holder(Path::new(PROC), &paths).is_some() {
        return in_use(error, &paths);
    }
    error
        .because(format!("this process already has IOMMU group {group} open in another mode"))
        .with_hint("give all its devices the same vfio-mode")
        .with_kind(ErrorKind::Usage)
}

/// Devices in the IOMMU group of `device`.
fn members(device: &BusDevice) -> impl Iterator<Item = BusDevice> {
    fs::read_dir(device.sysfs.join("iommu_group/devices")).into_iter().flatten().flatten().map(|entry| {
        BusDevice { name: entry.file_name().to_string_lossy().into_owned(), sysfs: entry.path() }
    })
}

fn cdev_path(device: &BusDevice, dev: &Path) -> Option<PathBuf> {
    cdev_name(device).map(|name| dev.join("vfio/devices").join(name))
}

/// Paths of the device's own node and of its group's node.
fn nodes_of(device: &BusDevice, dev: &Path) -> Vec<PathBuf> {
    let group = group_of(device).ok().map(|group| dev.join(format!("vfio/{group}")));
    cdev_path(device, dev).into_iter().chain(group).collect()
}

/// Explains why iommufd refused a device.
pub(super) fn bind_cdev(error: Error, device: &BusDevice, dev: &Path) -> Error {
    match error.errno() {
        Some(Errno::EBUSY) => group_busy(error, device, dev),
        Some(Errno::EINVAL) => in_use(error, &nodes_of(device, dev)),
        _ => bind(error, device, dev),
    }
}

/// Explains why a device was refused by its group or by iommufd.
pub(super) fn bind(error: Error, device: &BusDevice, dev: &Path) -> Error {
    match error.errno() {
        Some(Errno::EPERM) => not_permitted(error, device, dev, sees_all_processes(), remaps_interrupts()),
        Some(Errno::EACCES) => error
            .because(if device.sysfs.join("physfn").exists() {
                "it is a virtual function whose physical function uses a VFIO driver and requires its token"
            } else {
                "its virtual functions are in use, so it requires their token"
            })
            .with_hint("give the token that the physical function was opened with: --vfio-vf-token UUID"),
        Some(Errno::EBUSY | Errno::EINVAL) => match in_use(error, &nodes_of(device, dev)) {
            busy if busy.kind() == ErrorKind::Busy => busy,
            // In mode `compat` the same call also attaches the device.
            refused => attach(refused, device),
        },
        _ => error,
    }
}

/// Explains why a device did not get the page tables of an address space.
pub(super) fn attach(error: Error, device: &BusDevice) -> Error {
    if error.errno() != Some(Errno::EINVAL) {
        return error;
    }
    let error = error.with_kind(ErrorKind::Unavailable).with_hint("use --vfio-mode container");
    match has_first_stage_only(device) {
        true => error.because(
            "its IOMMU supports first-stage tables only, but this kernel's iommufd creates second-stage tables",
        ),
        false => error,
    }
}

/// Returns whether an Intel IOMMU translates by first-stage tables only (VT-d specification, 11.4.3, Extended
/// Capability Register: SMTS, SSTS, FSTS).
fn has_first_stage_only(device: &BusDevice) -> bool {
    let bit = |capabilities: u64, bit: u32| capabilities >> bit & 1 == 1;
    fs::read_to_string(device.sysfs.join("iommu/intel-iommu/ecap"))
        .ok()
        .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
        .is_some_and(|ecap| bit(ecap, 43) && !bit(ecap, 46) && bit(ecap, 47))
}

/// Explains EPERM, which iommufd returns both for a group in use and for a platform that does not isolate MSI
/// (`iommufd_device_bind`, drivers/iommu/iommufd/device.c). The unsafe parameter is suggested only if the
/// platform is certainly the reason. `all_seen` is whether the descriptors of all processes are visible,
/// `remapped` whether the kernel remaps interrupts.
fn not_permitted(error: Error, device: &BusDevice, dev: &Path, all_seen: bool, remapped: bool) -> Error {
    let Ok(group) = group_of(device) else { return unsafe_interrupts(error, "iommufd") };
    if !kernel_owned(device).is_empty() {
        return not_viable(device, group);
    }
    let others: Vec<BusDevice> = members(device).filter(|member| member.name != device.name).collect();
    let paths: Vec<PathBuf> = others.iter().filter_map(|member| cdev_path(member, dev)).collect();
    let named: Vec<&str> = others.iter().map(|member| &*member.name).collect();
    let shared = format!("IOMMU group {group} also has {}", named.join(", "));
    match holder(Path::new(PROC), &paths) {
        Some((pid, name)) => error
            .because(format!("{shared}, in use by pid {pid} ({name})"))
            .with_hint(format!("stop it: kill {pid}"))
            .with_kind(ErrorKind::Busy),
        None if holds(Path::new("/proc/self"), &paths) => error
            .because(format!("{shared}, which this process already has open through another /dev/iommu"))
            .with_hint("open all its devices through one /dev/iommu")
            .with_kind(ErrorKind::Usage),
        None if others.is_empty() && remapped => error,
        None if !others.is_empty() && (remapped || !all_seen) => error
            .because(format!("{shared}, most likely in use by a process that cannot be seen from here"))
            .with_hint("as root, outside of containers, find it: fuser -v /dev/vfio/* /dev/vfio/devices/*")
            .with_kind(ErrorKind::Busy),
        None => unsafe_interrupts(error, "iommufd"),
    }
}

/// Returns whether the kernel remaps interrupts, which isolates MSI. x86 then names its interrupt controllers
/// `IR-…` (arch/x86/kernel/apic/io_apic.c).
fn remaps_interrupts() -> bool {
    fs::read_to_string("/proc/interrupts").is_ok_and(|table| table.contains(" IR-"))
}

/// Explains that the kernel refuses a device whose MSI writes are not checked. `module` has the parameter
/// that allows it.
pub(super) fn unsafe_interrupts(error: Error, module: &str) -> Error {
    error
        .because("the platform does not isolate MSI interrupts")
        .with_hint(format!(
            "boot with interrupt remapping (intremap=on); or, unsafe: echo 1 > /sys/module/{module}/parameters/allow_unsafe_interrupts"
        ))
        .with_kind(ErrorKind::Unavailable)
}

/// Names the process that has one of `paths` open, if its descriptors are visible.
pub(super) fn in_use(error: Error, paths: &[PathBuf]) -> Error {
    match holder(Path::new(PROC), paths) {
        Some((pid, name)) => error
            .because(format!("in use by pid {pid} ({name})"))
            .with_hint(format!("stop it: kill {pid}"))
            .with_kind(ErrorKind::Busy),
        None if error.errno() == Some(Errno::EBUSY) => error
            .because("in use by another process")
            .with_hint("find it: fuser -v /dev/vfio/* /dev/vfio/devices/*"),
        // The kernel returns EINVAL for a cdev that is already bound, but also for other mistakes.
        None if error.errno() == Some(Errno::EINVAL) && !sees_all_processes() => error
            .because("most likely in use by a process of another user")
            .with_hint("as root, find it: fuser -v /dev/vfio/* /dev/vfio/devices/*")
            .with_kind(ErrorKind::Busy),
        None => error,
    }
}

/// Returns whether the descriptors of all processes are visible.
fn sees_all_processes() -> bool {
    fs::read_dir("/proc/1/fd").is_ok()
}

/// Returns the pid and name of another process that has one of the device nodes `paths` open. `proc` is
/// `/proc` on a real machine.
pub fn holder(proc: &Path, paths: &[PathBuf]) -> Option<(u32, String)> {
    fs::read_dir(proc).ok()?.flatten().find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok().filter(|pid| *pid != std::process::id())?;
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        holds(&entry.path(), paths).then(|| (pid, name.trim().to_owned()))
    })
}

/// Returns whether `process`, a directory of `/proc`, has one of `paths` open, even under another name: a
/// container may have a device node elsewhere.
fn holds(process: &Path, paths: &[PathBuf]) -> bool {
    let device = |path: &Path| {
        let found = fs::metadata(path).ok().filter(|found| found.file_type().is_char_device())?;
        Some(found.rdev())
    };
    let devices: Vec<u64> = paths.iter().filter_map(|path| device(path)).collect();
    fs::read_dir(process.join("fd")).into_iter().flatten().flatten().any(|fd| {
        fs::read_link(fd.path()).is_ok_and(|target| {
            let is_node = target.starts_with("/dev");
            paths.contains(&target)
                || (is_node && device(&fd.path()).is_some_and(|device| devices.contains(&device)))
        })
    })
}

/// Devices that keep the group from user space, with their drivers.
fn kernel_owned(device: &BusDevice) -> Vec<(String, String)> {
    members(device)
        .filter_map(|member| {
            let driver = fs::read_link(member.sysfs.join("driver")).ok()?;
            let driver = driver.file_name()?.to_str()?.to_owned();
            let harmless = matches!(driver.as_str(), "vfio-pci" | "pcieport" | "pci-stub")
                || member.sysfs.join("vfio-dev").is_dir();
            (!harmless).then_some((member.name, driver))
        })
        .collect()
}

/// Explains that a group is not viable, and names every device of it that is bound to a kernel driver.
pub(super) fn not_viable(device: &BusDevice, group: u32) -> Error {
    let others = kernel_owned(device);
    let named: Vec<String> = others.iter().map(|(name, driver)| format!("{name} ({driver})")).collect();
    Error::new(
        ErrorKind::Unavailable,
        format!("cannot use {}", device.name),
        format!("IOMMU group {group} is not viable: kernel drivers are bound to {}", named.join(", ")),
    )
    .with_hint(match others.as_slice() {
        [] => "unbind every other device of the group".to_owned(),
        others => {
            let names: Vec<&str> = others.iter().map(|(name, _)| name.as_str()).collect();
            format!("run: vireo-devbind --bind vfio-pci {}", names.join(" "))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_group_that_is_not_viable_names_its_members() {
        let dir = tempfile::tempdir().unwrap();
        for (name, driver) in
            [("0000:00:04.0", "vfio-pci"), ("0000:00:04.1", "e1000e"), ("0000:00:04.2", "e1000e")]
        {
            let device = dir.path().join("iommu_group/devices").join(name);
            fs::create_dir_all(&device).unwrap();
            symlink(format!("/sys/bus/pci/drivers/{driver}"), device.join("driver")).unwrap();
        }
        let device = BusDevice { name: "0000:00:04.0".into(), sysfs: dir.path().into() };
        let text = not_viable(&device, 7).to_string();
        for address in ["0000:00:04.1", "0000:00:04.2"] {
            assert!(text.contains(&format!("{address} (e1000e)")), "{text}");
        }
        let (_, command) = text.split_once("; run: vireo-devbind --bind vfio-pci ").unwrap();
        let mut named: Vec<&str> = command.split(' ').collect();
        named.sort_unstable();
        assert_eq!(named, ["0000:00:04.1", "0000:00:04.2"]);
    }

    #[test]
    fn the_entry_limit_that_is_advised_is_higher() {
        assert_eq!([0, 100, 65535].map(more_entries), [65535, 65535, 131_070]);
    }

    #[test]
    fn a_function_that_wants_a_token_is_not_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let device = BusDevice { name: "0000:00:04.0".into(), sysfs: dir.path().into() };
        let said =
            || bind_cdev(Error::os("cannot bind", Errno::EACCES), &device, Path::new("/dev")).to_string();
        assert!(
            said().contains("its virtual functions are in use") && said().ends_with("--vfio-vf-token UUID")
        );
        symlink("/sys", dir.path().join("physfn")).unwrap();
        assert!(said().contains("it is a virtual function"));
    }

    #[test]
    fn the_limit_that_is_asked_for_has_room_for_what_is_locked() {
        let error = beyond(Error::os("cannot map", Errno::ENOMEM), 18432, 24576, Accounting::PerUser);
        assert!(error.to_string().contains("run: ulimit -l 43008,"), "{error}");
    }

    #[test]
    fn a_limit_that_was_not_reached_is_not_named() {
        let error = || Error::os("cannot map", Errno::ENOMEM);
        assert_eq!(beyond(error(), 1024, u64::MAX / 1024, Accounting::PerProcess), error());
        assert!(beyond(error(), 1024, 1023, Accounting::PerProcess).hint().is_some());
    }

    #[test]
    fn eperm_is_the_device_cgroup_or_the_capability() {
        let said = |path| forbidden(Error::os("cannot open it", Errno::EPERM), Path::new(path)).to_string();
        for path in ["/dev/vfio/7", "/dev/vfio/devices/vfio0", "/dev/iommu"] {
            assert!(said(path).contains(&format!("device cgroup of this container or service forbids it; start the container with --device {path},")));
        }
        for path in ["/dev/vfio/noiommu-7", "/dev/vfio/devices/noiommu-vfio0"] {
            assert!(said(path).contains("CAP_SYS_RAWIO"), "{path}");
        }
    }

    #[test]
    fn an_iommu_without_second_stage_tables_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let device = BusDevice { name: "0000:00:04.0".into(), sysfs: dir.path().into() };
        fs::create_dir_all(dir.path().join("iommu/intel-iommu")).unwrap();
        // Bits 47, 46 and 43 stand for first-stage, second-stage and scalable-mode support.
        for (ecap, names_it) in [("880000f00f5e", true), ("c80000f00f5e", false), ("f00f5e", false)] {
            fs::write(dir.path().join("iommu/intel-iommu/ecap"), format!("{ecap}\n")).unwrap();
            for error in [
                attach(Error::os("cannot attach it", Errno::EINVAL), &device),
                bind(
                    Error::os("cannot open it through its group", Errno::EINVAL),
                    &device,
                    Path::new("/dev"),
                ),
            ] {
                assert_eq!(error.kind(), ErrorKind::Unavailable);
                assert!(error.to_string().ends_with("use --vfio-mode container"), "{error}");
                assert_eq!(error.why().contains("first-stage tables only"), names_it, "{ecap}: {error}");
            }
        }
        assert!(attach(Error::os("cannot attach it", Errno::ENOMEM), &device).hint().is_none());
    }

    /// Creates two functions that share group 7, with cdevs `vfio0` and `vfio1`, and an empty `/dev`.
    fn shared_group(root: &Path) -> (PathBuf, [BusDevice; 2]) {
        let (dev, devices) = (root.join("dev"), root.join("iommu_groups/7/devices"));
        let nodes = ["vfio0", "vfio1"].map(|cdev| {
            let device = BusDevice { name: format!("0000:00:04.{}", &cdev[4..]), sysfs: root.join(cdev) };
            fs::create_dir_all(device.sysfs.join("vfio-dev").join(cdev)).unwrap();
            fs::write(device.sysfs.join("vfio-dev").join(cdev).join("dev"), "").unwrap();
            fs::create_dir_all(&devices).unwrap();
            symlink(&device.sysfs, devices.join(&device.name)).unwrap();
            symlink(root.join("iommu_groups/7"), device.sysfs.join("iommu_group")).unwrap();
            device
        });
        fs::create_dir_all(dev.join("vfio/devices")).unwrap();
        (dev, nodes)
    }

    #[test]
    fn a_busy_group_is_never_called_unsafe() {
        let root = tempfile::tempdir().unwrap();
        let (dev, [own, other]) = shared_group(root.path());
        let refused = |all_seen, remapped| {
            let error = Error::os("cannot bind", Errno::EPERM);
            not_permitted(error, &own, &dev, all_seen, remapped)
        };
        let node = dev.join("vfio/devices/vfio1");
        fs::write(&node, "").unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .stdin(fs::File::open(&node).unwrap())
            .spawn()
            .unwrap();
        // `spawn` waits until the kernel closes the close-on-exec descriptors. The kernel changes the name
        // after that.
        let comm = format!("/proc/{}/comm", child.id());
        while fs::read_to_string(&comm).unwrap() != "sleep\n" {
            std::thread::yield_now();
        }
        let held = refused(true, false);
        child.kill().unwrap();
        child.wait().unwrap();
        let why =
            format!("EPERM: IOMMU group 7 also has {}, in use by pid {} (sleep)", other.name, child.id());
        assert_eq!((held.kind(), held.why()), (ErrorKind::Busy, &*why));

        let here = fs::File::open(&node).unwrap();
        assert_eq!(refused(true, false).kind(), ErrorKind::Usage);
        drop(here);
        // Other processes cannot be seen, or MSI is isolated: the group must be the reason.
        for (all_seen, remapped) in [(false, false), (false, true), (true, true)] {
            let error = refused(all_seen, remapped);
            assert_eq!(error.kind(), ErrorKind::Busy);
            assert!(!error.to_string().contains("unsafe"), "{error}");
        }
        assert!(refused(true, false).to_string().contains("allow_unsafe_interrupts"));
        fs::remove_file(root.path().join("iommu_groups/7/devices").join(&other.name)).unwrap();
        assert!(refused(false, false).to_string().contains("allow_unsafe_interrupts"));
        assert!(!refused(false, true).to_string().contains("unsafe"));
    }

    #[test]
    fn a_group_that_is_open_here_is_not_in_use_by_another_process() {
        let root = tempfile::tempdir().unwrap();
        let (dev, nodes) = shared_group(root.path());
        let busy = || Error::os("cannot open it", Errno::EBUSY);
        let opened = |path: &str| fs::File::create(dev.join(path)).unwrap();

        // The device's own node is open in this process, as it always is at a bind.
        let _own = opened("vfio/devices/vfio0");
        assert_eq!(bind_cdev(busy(), &nodes[0], &dev).kind(), ErrorKind::Busy);
        let other = opened("vfio/devices/vfio1");
        let error = group_open(busy(), &nodes[0], &dev);
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(
            error
                .to_string()
                .contains("this process already has IOMMU group 7 open in another mode; give all"),
            "{error}"
        );
        drop(other);
        let _group = opened("vfio/7");
        assert_eq!(bind_cdev(busy(), &nodes[0], &dev).kind(), ErrorKind::Usage);
    }

    #[test]
    fn the_holder_of_a_file_is_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut child =
            std::process::Command::new("sleep").arg("1000").stdin(file.reopen().unwrap()).spawn().unwrap();
        let found = holder(Path::new(PROC), &[file.path().to_owned()]);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found.map(|(pid, _)| pid), Some(child.id()));
    }
}
