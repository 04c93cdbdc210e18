//! Acquires a device: from its name to its descriptors, its address space and a [`Device`]. This module has
//! the only branch on how a mode opens descriptors.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use vireo_vfio::NOIOMMU_PREFIX;

use super::device::Open;
use super::device_nodes::{self, DeviceNodes};
use super::noiommu::{iommu_on, no_group};
use super::phases::{Phase, Phases};
use super::space::AddressSpace;
use super::{Device, DeviceFds, LiveUpdate, VfioMode};
use crate::args::VfToken;
use crate::error::{Error, ErrorKind, Result};
use crate::iommufd::WeakIommufd;

/// Device on a bus, identified by its name (`0000:00:04.0`) and its directory in sysfs.
#[derive(Clone, Debug)]
pub struct BusDevice {
    /// Name, as `VFIO_GROUP_GET_DEVICE_FD` expects it.
    pub name: String,
    /// Directory in sysfs, which has `iommu_group` and `vfio-dev`.
    pub sysfs: PathBuf,
}

/// A device that this process owns.
#[derive(Debug)]
pub struct Acquired {
    /// The device. Drop it before the memory that it was given.
    pub device: Device,
    /// Address space: what the device can reach.
    pub space: Arc<AddressSpace>,
    /// The mode that was used; never `auto`.
    pub mode: VfioMode,
    /// Short reason for choosing the mode.
    pub why: String,
    /// Time that each step of the acquisition took.
    pub phases: Vec<Phase>,
}

/// VFIO state of the process: one address space for each mode in use, shared by the ports in that mode, or
/// one for each IOMMU group.
///
/// Several threads can acquire devices at once. The kernel's resets of the devices, which take long, then run
/// in parallel.
#[derive(Debug)]
pub struct Vfio {
    pub(super) dev: PathBuf,
    /// `/sys/class/vfio`: the groups that have a node, with its device number.
    groups: PathBuf,
    pub(super) nodes: DeviceNodes,
    vf_token: Option<VfToken>,
    isolated: bool,
    pub(super) spaces: Mutex<HashMap<SpaceKey, Weak<AddressSpace>>>,
    /// The open `/dev/iommu` of the process, while it has one: devices share it.
    pub(super) iommufd: Mutex<WeakIommufd>,
    /// Held from opening a group until its address space knows the group: a group can be opened only once.
    pub(super) opening: Mutex<()>,
}

/// Key of an address space: the devices' mode, and their IOMMU group if ports are isolated. Devices with the
/// same key share the space. The kernel gives the devices of one group one address space in any case.
pub(super) type SpaceKey = (VfioMode, Option<u32>);

impl Vfio {
    /// Creates the state, without devices. `vf_token` is passed to the kernel for virtual functions whose
    /// physical function is a VFIO device too, and for devices with SR-IOV.
    pub fn new(vf_token: Option<VfToken>) -> Self {
        Self::with_nodes(vf_token, DeviceNodes::default())
    }

    /// Same as [`Vfio::new`], but takes device nodes from `nodes`.
    pub fn with_nodes(vf_token: Option<VfToken>, nodes: DeviceNodes) -> Self {
        Self {
            dev: PathBuf::from("/dev"),
            groups: PathBuf::from("/sys/class/vfio"),
            nodes,
            vf_token,
            isolated: false,
            spaces: Mutex::default(),
            iommufd: Mutex::default(),
            opening: Mutex::default(),
        }
    }

    /// Uses the `/dev` and `/sys/class` below `root`.
    #[must_use]
    pub fn with_dev_dir(self, root: &Path) -> Self {
        Self { dev: root.join("dev"), groups: root.join("sys/class/vfio"), ..self }
    }

    /// Gives each IOMMU group its own address space from now on, if `isolated` (`--isolate-ports`).
    #[must_use]
    pub fn isolate(self, isolated: bool) -> Self {
        Self { isolated, ..self }
    }

    /// Acquires `device` in `mode`.
    ///
    /// # Errors
    /// Why this device is unavailable in this mode, and the command that fixes it. An explicit mode never
    /// falls back to another.
    pub fn acquire(&self, device: &BusDevice, mode: VfioMode) -> Result<Acquired> {
        let (chosen, why) = match mode {
            VfioMode::Auto => self.choose(device)?,
            explicit => (explicit, "as requested".to_owned()),
        };
        match self.acquire_in(device, chosen, why) {
            Err(Refusal { error, retry_in_container: true })
                if mode == VfioMode::Auto && self.group_path(device, VfioMode::Container).is_ok() =>
            {
                let why = format!("auto: cdev is not possible: {}", error.why());
                self.acquire_in(device, VfioMode::Container, why)
            }
            other => other,
        }
        .map_err(|refusal| refusal.error)
    }

    fn acquire_in(
        &self,
        device: &BusDevice,
        mode: VfioMode,
        why: String,
    ) -> std::result::Result<Acquired, Refusal> {
        let mut phases = Phases::start();
        let open = match mode {
            VfioMode::Cdev | VfioMode::NoiommuCdev => {
                let fds = self.open_cdev(device, mode)?;
                phases.end("open");
                self.complete_cdev(device, mode, fds, &mut phases)?
            }
            VfioMode::Auto | VfioMode::Container | VfioMode::Compat | VfioMode::Noiommu => {
                let opening = lock(&self.opening);
                let fds = self.open_group(device, mode)?;
                phases.end("open");
                self.complete_group(device, mode, fds, opening, &mut phases)?
            }
        };
        Ok(Self::finish(device, mode, why, open, phases)?)
    }

    /// Opens the descriptors of `device` to pass them to another process, which can then
    /// [`adopt`](Self::adopt) them. `auto` becomes the mode that [`Vfio::acquire`] tries first.
    ///
    /// # Errors
    /// Same as [`Vfio::acquire`].
    pub fn open(&self, device: &BusDevice, mode: VfioMode) -> Result<(VfioMode, DeviceFds)> {
        let mode = if mode == VfioMode::Auto { self.choose(device)?.0 } else { mode };
        let fds = match mode {
            VfioMode::Cdev | VfioMode::NoiommuCdev => self.open_cdev(device, mode)?.into(),
            _ => self.open_group(device, mode)?.into(),
        };
        Ok((mode, fds))
    }

    /// Returns the nodes that [`Vfio::acquire`] would open for `device`.
    ///
    /// # Errors
    /// Same as [`Vfio::acquire`], as far as sysfs shows them.
    pub fn paths(&self, device: &BusDevice, mode: VfioMode) -> Result<[PathBuf; 2]> {
        let mode = if mode == VfioMode::Auto { self.choose(device)?.0 } else { mode };
        match mode {
            VfioMode::Cdev | VfioMode::NoiommuCdev => {
                Ok([self.iommufd_path(), self.cdev_path(device, mode)?.1])
            }
            _ => Ok([self.container_path(mode), self.group_path(device, mode)?.1]),
        }
    }

    /// Acquires `device` with descriptors that another process opened. Opens no device node.
    ///
    /// # Errors
    /// Same as [`Vfio::acquire`]; `Usage` if the descriptors do not fit the mode, `Unavailable` or
    /// `Permission` if one belongs to another device.
    pub fn adopt(&self, device: &BusDevice, mode: VfioMode, fds: DeviceFds) -> Result<Acquired> {
        let what = || format!("cannot adopt {} in mode {mode}", device.name);
        let mut phases = Phases::start();
        let open = match (mode, fds) {
            (VfioMode::Cdev | VfioMode::NoiommuCdev, DeviceFds::Cdev(fds)) => {
                let (number, path) = self.cdev_path(device, mode)?;
                device_nodes::check(&fds.device, &path, &number, &device.name)?;
                self.complete_cdev(device, mode, fds, &mut phases).map_err(|refusal| refusal.error)?
            }
            (VfioMode::Container | VfioMode::Compat | VfioMode::Noiommu, DeviceFds::Group(fds)) => {
                self.check_group(device, mode, &fds)?;
                self.complete_group(device, mode, fds, lock(&self.opening), &mut phases)?
            }
            _ => {
                return Err(Error::new(ErrorKind::Usage, what(), "its descriptors belong to another mode"));
            }
        };
        Self::finish(device, mode, "with descriptors from another process".to_owned(), open, phases)
    }

    pub(super) fn finish(
        device: &BusDevice,
        mode: VfioMode,
        why: String,
        open: Open,
        mut phases: Phases,
    ) -> Result<Acquired> {
        let space = Arc::clone(&open.held.space);
        let device = Device::new(device.name.clone(), open)?;
        phases.end("attach");
        space.refresh_ranges()?;
        Ok(Acquired { device, space, mode, why, phases: phases.done })
    }

    /// Chooses the mode for `auto`: cdev if the kernel offers it, otherwise the container.
    fn choose(&self, device: &BusDevice) -> Result<(VfioMode, String)> {
        /// Read once, because the list of symbols is long.
        static LIVE_UPDATE: OnceLock<LiveUpdate> = OnceLock::new();
        let what = || format!("cannot choose a VFIO mode for {}", device.name);
        let cdev = cdev_name(device);
        let group = group_of(device).ok();
        if cdev.as_deref().is_some_and(|name| name.starts_with(NOIOMMU_PREFIX))
            || group.is_some_and(|group| self.group_node(NOIOMMU_PREFIX, group).is_some())
        {
            return Err(Error::new(
                ErrorKind::Unavailable,
                what(),
                "the device has no IOMMU, and auto never chooses a no-IOMMU mode",
            )
            .with_hint(format!(
                "{}; or accept that the NIC can reach all memory: --vfio-mode noiommu",
                iommu_on()
            )));
        }
        let reason = match cdev {
            Some(name)
                if self.has_iommufd()
                    && self
                        .cdev_path(device, VfioMode::Cdev)
                        .is_ok_and(|(_, path)| self.nodes.has(&path)) =>
            {
                let mut why = format!("auto: the kernel offers /dev/vfio/devices/{name}");
                if *LIVE_UPDATE.get_or_init(|| LiveUpdate::of("/".as_ref())) == LiveUpdate::Cdevs {
                    why += ", which it keeps in a live update";
                }
                return Ok((VfioMode::Cdev, why));
            }
            Some(_) => "auto: there is no /dev/iommu",
            None => "auto: the kernel has no VFIO cdev",
        };
        match group {
            Some(_) => Ok((VfioMode::Container, reason.to_owned())),
            None => Err(no_group(what())),
        }
    }

    /// Returns whether iommufd is open or its node can be opened. A passed node is gone from `nodes` once it
    /// is open. [`open_cdev`](Self::open_cdev) takes and keeps it under the same lock, so that another thread
    /// finds one or the other.
    fn has_iommufd(&self) -> bool {
        let kept = lock(&self.iommufd);
        kept.upgrade().is_some() || self.nodes.has(&self.iommufd_path())
    }

    /// Path of iommufd's node.
    pub(super) fn iommufd_path(&self) -> PathBuf {
        self.dev.join("iommu")
    }

    /// Path of the node of `group`, if the kernel has created one of this `kind`, which is `""` or
    /// [`NOIOMMU_PREFIX`].
    pub(super) fn group_node(&self, kind: &str, group: u32) -> Option<PathBuf> {
        let name = format!("{kind}{group}");
        let number = self.group_number(&name);
        // Only sysfs identifies a node that has another name in a container.
        if number.is_none() && self.groups.exists() {
            return None;
        }
        self.nodes.find(&self.dev.join("vfio"), &name, number.as_deref())
    }

    /// Device number of the group's node with this `name` below `/dev/vfio`.
    pub(super) fn group_number(&self, name: &str) -> Option<String> {
        let number = fs::read_to_string(self.groups.join(name).join("dev")).ok()?;
        Some(number.trim().to_owned())
    }

    /// Returns the token to pass to the kernel for `device`. The kernel refuses a token where it expects
    /// none: for a device without SR-IOV, and for a virtual function whose physical function is not bound to
    /// VFIO's driver.
    pub(super) fn token_of(&self, device: &BusDevice) -> Option<VfToken> {
        let driver =
            |device: PathBuf| fs::read_link(device.join("driver")).ok()?.file_name().map(OsString::from);
        let physfn = device.sysfs.join("physfn");
        let wanted = if physfn.exists() {
            driver(physfn) == driver(device.sysfs.clone())
        } else {
            device.sysfs.join("sriov_totalvfs").exists()
        };
        self.vf_token.filter(|_| wanted)
    }

    pub(super) fn space_key(&self, device: &BusDevice, mode: VfioMode) -> SpaceKey {
        (mode, if self.isolated { group_of(device).ok() } else { None })
    }

    pub(super) fn existing(&self, key: SpaceKey) -> Option<Arc<AddressSpace>> {
        lock(&self.spaces).get(&key).and_then(usable)
    }

    /// Returns the address space of `key`, created by `make` if no port has it yet.
    pub(super) fn space(
        &self,
        key: SpaceKey,
        make: impl FnOnce() -> Result<AddressSpace>,
    ) -> Result<Arc<AddressSpace>> {
        let mut spaces = lock(&self.spaces);
        if let Some(space) = spaces.get(&key).and_then(usable) {
            return Ok(space);
        }
        let mode = key.0;
        let mixed = |other: &VfioMode| other.has_iommu() != mode.has_iommu();
        if let Some(((other, _), _)) =
            spaces.iter().find(|((other, _), space)| mixed(other) && usable(space).is_some())
        {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("cannot mix --vfio-mode {mode} with {other}"),
                "NICs without an IOMMU use physical addresses, but the others reach only what is mapped for them",
            )
            .with_hint("use modes with an IOMMU for all ports, or no-IOMMU modes for all"));
        }
        let space = Arc::new(make()?);
        spaces.insert(key, Arc::downgrade(&space));
        Ok(space)
    }
}

/// Returns the space if it exists and devices can still be added to it.
fn usable(space: &Weak<AddressSpace>) -> Option<Arc<AddressSpace>> {
    space.upgrade().filter(|space| !space.has_no_groups())
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The guarded values change by single insertions, so a panic elsewhere leaves nothing half updated.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Number of the device's IOMMU group.
pub(super) fn group_of(device: &BusDevice) -> std::io::Result<u32> {
    vireo_vfio::group_of(&device.sysfs)
}

/// Name of the device's character device below `/dev/vfio/devices`. Before kernel 7.3, a device without an
/// IOMMU has an entry in sysfs but no device number.
pub(super) fn cdev_name(device: &BusDevice) -> Option<String> {
    vireo_vfio::cdev_of(&device.sysfs)
}

/// Why a device was not acquired.
pub(super) struct Refusal {
    pub(super) error: Error,
    /// Whether mode `container` may work where `cdev` does not.
    pub(super) retry_in_container: bool,
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self { error, retry_in_container: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommufd::Iommufd;
    use crate::vfio::fds::{CdevFds, GroupFds};
    use crate::vfio::space::{self, Container};
    use std::os::unix::fs::symlink;

    /// Descriptor that stands in for iommufd.
    fn iommufd(null: fs::File) -> Iommufd {
        // SAFETY: the null device has no ioctls.
        unsafe { Iommufd::from_fd_unchecked(null.into()) }
    }

    #[test]
    fn descriptors_of_another_device_are_not_adopted() {
        let root = tempfile::tempdir().unwrap();
        let (device, groups) = (root.path().join("device"), root.path().join("sys/class/vfio"));
        let null = || fs::File::open("/dev/null").unwrap();
        let zero = "1:5";
        fs::create_dir_all(device.join("vfio-dev/vfio0")).unwrap();
        fs::create_dir_all(groups.join("3")).unwrap();
        fs::write(device.join("vfio-dev/vfio0/dev"), zero).unwrap();
        fs::write(groups.join("3/dev"), zero).unwrap();
        symlink("/sys/kernel/iommu_groups/3", device.join("iommu_group")).unwrap();
        let device = BusDevice { name: "0000:00:0d.0".into(), sysfs: device };
        let vfio = Vfio::new(None).with_dev_dir(root.path());
        fs::create_dir_all(root.path().join("dev/vfio")).unwrap();
        fs::write(root.path().join("dev/vfio/3"), "").unwrap();
        let cdev = CdevFds { iommufd: iommufd(null()), device: null().into() };
        let group = GroupFds { container: null().into(), group: Arc::new(null()) };
        for (mode, fds) in [(VfioMode::Cdev, cdev.into()), (VfioMode::Container, group.into())] {
            let error = vfio.adopt(&device, mode, fds).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unavailable);
            assert!(error.why().starts_with("it is device 1:3, but "), "{error}");
            assert!(error.to_string().ends_with(" c 1 5"), "{error}");
        }
        // The group's number is right, but its container is something else.
        fs::write(groups.join("3/dev"), "1:3").unwrap();
        for mode in [VfioMode::Container, VfioMode::Compat] {
            let fds = GroupFds { container: null().into(), group: Arc::new(null()) };
            let error = vfio.adopt(&device, mode, fds.into()).unwrap_err();
            assert!(
                error.kind() == ErrorKind::Permission && error.why().contains("its container is not"),
                "{error}"
            );
        }
        let files = || {
            let file = || tempfile::tempfile().unwrap();
            GroupFds { container: file().into(), group: Arc::new(file()) }
        };
        fs::write(groups.join("3/dev"), "0:0").unwrap();
        let error = vfio.adopt(&device, VfioMode::Container, files().into());
        assert!(error.unwrap_err().why().starts_with("it is not a character device, but "));
        fs::remove_dir_all(&groups).unwrap();
        let error = vfio.adopt(&device, VfioMode::Container, files().into());
        assert!(error.unwrap_err().why().contains("has no node for IOMMU group 3"));
    }

    /// A container without a group has no mappings and accepts no device: the next device gets another
    /// container.
    #[test]
    fn a_container_without_groups_is_not_used_again() {
        let null = || fs::File::open("/dev/null").unwrap();
        let vfio = Vfio::new(None);
        for iommufd in [false, true] {
            let key = (if iommufd { VfioMode::Compat } else { VfioMode::Container }, None);
            let group = Arc::new(null());
            let made = |group: &Arc<fs::File>| {
                let container = Container::new(space::null(), iommufd, 3, group);
                vfio.space(key, || Ok(AddressSpace::type1(container))).unwrap()
            };
            let space = made(&group);
            assert!(Arc::ptr_eq(&made(&Arc::new(null())), &space));
            let container = space.container().unwrap();
            assert!(Arc::ptr_eq(&container.group(3).unwrap(), &group));
            let other = Arc::new(null());
            container.add(4, &other);
            drop(group);
            assert!(container.group(3).is_none() && vfio.existing(key).is_some());
            drop(other);
            // iommufd keeps the mappings of its container.
            assert_eq!(vfio.existing(key).is_some(), iommufd);
            let group = Arc::new(null());
            assert_eq!(Arc::ptr_eq(&made(&group), &space), iommufd);
        }
    }

    #[test]
    fn a_token_is_shown_where_the_kernel_wants_one() {
        let root = tempfile::tempdir().unwrap();
        let vfio = Vfio::new("bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3".parse().ok());
        let device = |name: &str, driver: &str| {
            let device = BusDevice { name: name.into(), sysfs: root.path().join(name) };
            fs::create_dir_all(&device.sysfs).unwrap();
            symlink(format!("/sys/bus/pci/drivers/{driver}"), device.sysfs.join("driver")).unwrap();
            device
        };
        let function_of = |name, pf: &BusDevice| {
            let device = device(name, "vfio-pci");
            symlink(&pf.sysfs, device.sysfs.join("physfn")).unwrap();
            device
        };
        let (plain, ours, kernels) =
            (device("plain", "vfio-pci"), device("pf", "vfio-pci"), device("igb", "igb"));
        fs::write(ours.sysfs.join("sriov_totalvfs"), "7\n").unwrap();
        let shown = |device: &BusDevice| vfio.token_of(device).is_some();
        assert!(shown(&ours) && shown(&function_of("vf0", &ours)));
        assert!(!shown(&plain) && !shown(&function_of("vf1", &kernels)));
    }

    /// One `/dev/iommu` is passed for all ports: the first port takes it, and later ports find it open.
    #[test]
    fn every_port_finds_the_one_iommufd_that_was_passed() {
        let root = tempfile::tempdir().unwrap();
        let names = ["iommu", "vfio0", "vfio1"];
        let nodes = DeviceNodes::passed(
            names.map(|name| (name.into(), fs::File::open("/dev/null").unwrap().into())).into(),
        );
        let vfio = Vfio::with_nodes(None, nodes);
        let ports = ["vfio0", "vfio1"].map(|name| {
            let device = BusDevice { name: name.into(), sysfs: root.path().join(name) };
            let cdev = device.sysfs.join("vfio-dev").join(name);
            fs::create_dir_all(&cdev).unwrap();
            fs::write(cdev.join("dev"), "1:3\n").unwrap();
            device
        });
        let opened = ports.map(|device| vfio.open(&device, VfioMode::Auto).unwrap());
        assert!(opened.iter().all(|(mode, _)| *mode == VfioMode::Cdev), "{opened:?}");
    }
}
