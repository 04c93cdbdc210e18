//! From a device's name to its descriptors, its address space and a [`Device`]: the one branch on how a
//! mode opens things.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use vfio_bindings::bindings::vfio as uapi;

use super::space::{AddressSpace, Container};
use super::{Device, DeviceFds, VfioMode, diagnose, sys};
use crate::args::VfToken;
use crate::error::{Error, ErrorKind, Result};
use crate::ioctl::counted;
use crate::iommufd::{self, Iommufd};

/// A device by its name on its bus (`0000:00:04.0`) and its directory in sysfs.
#[derive(Clone, Debug)]
pub struct Node {
    /// Name, as `VFIO_GROUP_GET_DEVICE_FD` takes it.
    pub name: String,
    /// Directory with `iommu_group` and `vfio-dev`.
    pub sysfs: PathBuf,
}

/// A step of the acquisition and how long it took.
#[derive(Clone, Copy, Debug)]
pub struct Phase {
    /// `open`, `bind` or `attach`.
    pub name: &'static str,
    /// Time in the kernel and around it.
    pub took: Duration,
}

/// A device that this process owns.
#[derive(Debug)]
pub struct Acquired {
    /// The device. Drop it before the memory that it was given.
    pub device: Device,
    /// What it can reach.
    pub space: Arc<AddressSpace>,
    /// The mode that was used; never `auto`.
    pub mode: VfioMode,
    /// Why this mode, in a few words.
    pub why: String,
    /// What it took.
    pub phases: Vec<Phase>,
}

/// The process's VFIO state: one address space for each mode in use, shared by the ports in that mode.
#[derive(Debug)]
pub struct Vfio {
    dev: PathBuf,
    vf_token: Option<VfToken>,
    spaces: Mutex<HashMap<VfioMode, Weak<AddressSpace>>>,
}

impl Vfio {
    /// State with no device. `vf_token` is shown to the kernel for virtual functions whose physical
    /// function is a VFIO device too.
    pub fn new(vf_token: Option<VfToken>) -> Self {
        Self { dev: PathBuf::from("/dev"), vf_token, spaces: Mutex::default() }
    }

    /// Acquires `node` in `mode`.
    ///
    /// # Errors
    /// With the reason why this device cannot be had in this mode and the command that mends it. An explicit
    /// mode never falls back to another.
    pub fn acquire(&self, node: &Node, mode: VfioMode) -> Result<Acquired> {
        let (mode, why) = match mode {
            VfioMode::Auto => self.choose(node)?,
            explicit => (explicit, "as asked".to_owned()),
        };
        let mut phases = Phases::start();
        let fds = match mode {
            VfioMode::Cdev | VfioMode::NoiommuCdev => self.open_cdev(node, mode)?,
            VfioMode::Auto | VfioMode::Container | VfioMode::Compat | VfioMode::Noiommu => {
                self.open_group(node, mode)?
            }
        };
        self.complete(node, mode, why, fds, &mut phases)
    }

    /// Completes descriptors that a launcher opened and passed on: no device node is opened here.
    ///
    /// # Errors
    /// As for [`Vfio::acquire`].
    pub fn adopt(&self, node: &Node, mode: VfioMode, fds: DeviceFds) -> Result<Acquired> {
        self.complete(node, mode, "by descriptors from the launcher".to_owned(), fds, &mut Phases::start())
    }

    fn complete(
        &self,
        node: &Node,
        mode: VfioMode,
        why: String,
        fds: DeviceFds,
        phases: &mut Phases,
    ) -> Result<Acquired> {
        phases.end("open");
        let (device, space) = match fds {
            DeviceFds::Cdev { iommufd, device } => self.complete_cdev(node, mode, iommufd, device, phases)?,
            DeviceFds::Group { container, group } => {
                self.complete_group(node, mode, container, group, phases)?
            }
        };
        let device = Device::new(node.name.clone(), device, Arc::clone(&space))?;
        phases.end("attach");
        space.refresh_ranges()?;
        Ok(Acquired { device, space, mode, why, phases: std::mem::take(&mut phases.done) })
    }

    /// `auto`: cdev where the kernel offers it, else the container.
    fn choose(&self, node: &Node) -> Result<(VfioMode, String)> {
        let what = || format!("cannot choose a VFIO mode for {}", node.name);
        let cdev = cdev_name(node);
        let group = group_of(node).ok();
        let physical_only = cdev.as_deref().is_some_and(|name| name.starts_with(NOIOMMU_PREFIX))
            || group.is_some_and(|group| self.dev.join(format!("vfio/{NOIOMMU_PREFIX}{group}")).exists());
        if physical_only {
            return Err(Error::new(ErrorKind::Unavailable, what(), "the device has no IOMMU and auto never goes without")
                .mend("turn the IOMMU on (intel_iommu=on), or accept that the NIC can reach all memory: --vfio-mode noiommu"));
        }
        let reason = match cdev {
            Some(name)
                if self.dev.join("iommu").exists() && self.dev.join("vfio/devices").join(&name).exists() =>
            {
                return Ok((VfioMode::Cdev, format!("auto: the kernel offers /dev/vfio/devices/{name}")));
            }
            Some(_) => "auto: there is no /dev/iommu",
            None => "auto: the kernel has no VFIO cdev",
        };
        match group {
            Some(_) => Ok((VfioMode::Container, reason.to_owned())),
            None => Err(no_group(what())),
        }
    }

    fn open_cdev(&self, node: &Node, mode: VfioMode) -> Result<DeviceFds> {
        let what = || format!("cannot use {} in mode {mode}", node.name);
        let name = cdev_name(node).ok_or_else(|| {
            Error::new(
                ErrorKind::Unavailable,
                what(),
                "the kernel gives it no VFIO cdev (CONFIG_VFIO_DEVICE_CDEV, 6.6)",
            )
            .mend("use --vfio-mode container")
        })?;
        match (name.starts_with(NOIOMMU_PREFIX), mode) {
            (true, VfioMode::Cdev) => return Err(needs_noiommu(what(), VfioMode::NoiommuCdev)),
            (false, VfioMode::NoiommuCdev) => return Err(has_iommu(what())),
            _ => {}
        }
        let iommufd = match self.existing(mode).and_then(|space| space.ioas().cloned()) {
            Some(ioas) => ioas.iommufd().clone(),
            None => Iommufd::open()?,
        };
        let path = self.dev.join("vfio/devices").join(&name);
        let device = open(&path)?;
        let expected = fs::read_to_string(node.sysfs.join("vfio-dev").join(&name).join("dev"))
            .map_err(|error| Error::io(format!("cannot read the device number of {name}"), &error))?;
        let metadata = device
            .metadata()
            .map_err(|error| Error::io(format!("cannot examine {}", path.display()), &error))?;
        let (major, minor) = (nix::sys::stat::major(metadata.rdev()), nix::sys::stat::minor(metadata.rdev()));
        if expected.trim() != format!("{major}:{minor}") {
            return Err(Error::new(
                ErrorKind::Unavailable,
                format!("cannot use {}", path.display()),
                format!("it is device {major}:{minor} and {} is {}", node.name, expected.trim()),
            )
            .mend("run: udevadm trigger --subsystem-match=vfio-dev"));
        }
        Ok(DeviceFds::Cdev { iommufd, device: device.into() })
    }

    /// Bind, allocate, attach: the order in which a map fails where it is made.
    fn complete_cdev(
        &self,
        node: &Node,
        mode: VfioMode,
        iommufd: Iommufd,
        device: OwnedFd,
        phases: &mut Phases,
    ) -> Result<(OwnedFd, Arc<AddressSpace>)> {
        let token = self.vf_token.map(VfToken::bytes);
        let mut bind = uapi::vfio_device_bind_iommufd {
            argsz: size_of::<uapi::vfio_device_bind_iommufd>() as u32,
            flags: if token.is_some() { uapi::VFIO_DEVICE_BIND_FLAG_TOKEN } else { 0 },
            iommufd: std::os::fd::AsFd::as_fd(&iommufd).as_raw_fd(),
            out_devid: 0,
            token_uuid_ptr: token.as_ref().map_or(0, |token| token.as_ptr() as u64),
        };
        // SAFETY: the structure is complete; the token's 16 bytes live until after the call.
        counted(unsafe { sys::bind_iommufd(device.as_raw_fd(), &mut bind) }).map_err(|errno| {
            diagnose::bind(Error::os(format!("cannot bind {} to iommufd", node.name), errno), node, &self.dev)
        })?;
        phases.end("bind");
        let space = self.space(mode, || {
            Ok(AddressSpace::iommufd(iommufd.ioas_alloc()?, mode == VfioMode::NoiommuCdev))
        })?;
        let mut attach = uapi::vfio_device_attach_iommufd_pt {
            argsz: size_of::<uapi::vfio_device_attach_iommufd_pt>() as u32,
            flags: 0,
            pt_id: space.ioas().map_or(0, |ioas| ioas.id()),
            pasid: 0,
        };
        // SAFETY: the structure is complete.
        counted(unsafe { sys::attach_iommufd_pt(device.as_raw_fd(), &mut attach) })
            .map_err(|errno| Error::os(format!("cannot attach {} to its address space", node.name), errno))?;
        Ok((device, space))
    }

    fn open_group(&self, node: &Node, mode: VfioMode) -> Result<DeviceFds> {
        let what = || format!("cannot use {} in mode {mode}", node.name);
        let group = group_of(node).map_err(|_| no_group(what()))?;
        let plain = self.dev.join(format!("vfio/{group}"));
        let physical = self.dev.join(format!("vfio/{NOIOMMU_PREFIX}{group}"));
        let path = match mode {
            VfioMode::Noiommu if !physical.exists() && plain.exists() => return Err(has_iommu(what())),
            VfioMode::Noiommu => physical,
            _ if !plain.exists() && physical.exists() => {
                return Err(needs_noiommu(what(), VfioMode::Noiommu));
            }
            _ => plain,
        };
        let existing = self.existing(mode);
        let kept = existing.as_ref().and_then(|space| space.container());
        let cannot_clone = |error| Error::io("cannot duplicate a descriptor", &error);
        let group_file = match kept.and_then(|c| lock(&c.groups).get(&group).map(File::try_clone)) {
            Some(file) => file.map_err(cannot_clone)?,
            None => open(&path).map_err(|error| diagnose::group_open(error, &path))?,
        };
        let container = match kept {
            Some(container) => container.fd.try_clone().map_err(cannot_clone)?,
            None if mode == VfioMode::Compat => open(Path::new(iommufd::PATH))
                .map_err(|error| error.mend("run: modprobe iommufd, or choose --vfio-mode container"))?
                .into(),
            None => open(&self.dev.join("vfio/vfio"))
                .map_err(|error| error.mend("run: modprobe vfio-pci"))?
                .into(),
        };
        Ok(DeviceFds::Group { container, group: group_file.into() })
    }

    fn complete_group(
        &self,
        node: &Node,
        mode: VfioMode,
        container_fd: OwnedFd,
        group_fd: OwnedFd,
        phases: &mut Phases,
    ) -> Result<(OwnedFd, Arc<AddressSpace>)> {
        let group = group_of(node).map_err(|_| no_group(format!("cannot use {}", node.name)))?;
        let mut status =
            uapi::vfio_group_status { argsz: size_of::<uapi::vfio_group_status>() as u32, flags: 0 };
        // SAFETY: the structure is complete.
        counted(unsafe { sys::group_get_status(group_fd.as_raw_fd(), &mut status) })
            .map_err(|errno| Error::os(format!("cannot read the state of IOMMU group {group}"), errno))?;
        if status.flags & uapi::VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(diagnose::not_viable(node, group));
        }
        let group_file = File::from(group_fd);
        let in_container = status.flags & uapi::VFIO_GROUP_FLAGS_CONTAINER_SET != 0;
        let set_container = |container: &OwnedFd| {
            if in_container {
                return Ok(());
            }
            // SAFETY: the argument is a descriptor that is open for the call.
            counted(unsafe { sys::group_set_container(group_file.as_raw_fd(), &container.as_raw_fd()) })
                .map(drop)
                .map_err(|errno| {
                    Error::os(format!("cannot put IOMMU group {group} into its container"), errno)
                })
        };
        let mut fresh = false;
        let space = self.space(mode, || {
            fresh = true;
            set_container(&container_fd)?;
            let iommu =
                if mode == VfioMode::Noiommu { uapi::VFIO_NOIOMMU_IOMMU } else { uapi::VFIO_TYPE1v2_IOMMU };
            if !in_container {
                set_iommu(&container_fd, iommu)?;
            }
            let container = Container {
                groups: Mutex::default(),
                fd: container_fd
                    .try_clone()
                    .map_err(|error| Error::io("cannot duplicate a descriptor", &error))?,
            };
            Ok(if mode == VfioMode::Noiommu {
                AddressSpace::none(container)
            } else {
                AddressSpace::type1(container)
            })
        })?;
        let Some(container) = space.container() else {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("cannot use {}", node.name),
                "its mode has no container",
            ));
        };
        if !fresh {
            set_container(&container.fd)?;
        }
        phases.end("bind");
        let device = self.device_fd(node, &group_file)?;
        lock(&container.groups).entry(group).or_insert(group_file);
        Ok((device, space))
    }

    fn device_fd(&self, node: &Node, group: &File) -> Result<OwnedFd> {
        let what = || format!("cannot open {} in its group", node.name);
        let name = match &self.vf_token {
            Some(token) => format!("{} vf_token={token}", node.name),
            None => node.name.clone(),
        };
        let name = CString::new(name)
            .map_err(|_| Error::new(ErrorKind::Usage, what(), "the name has a NUL byte in it"))?;
        // SAFETY: the argument is a string that ends in NUL and lives for the call.
        let fd = counted(unsafe { sys::group_get_device_fd(group.as_raw_fd(), name.as_ptr()) })
            .map_err(|errno| diagnose::bind(Error::os(what(), errno), node, &self.dev))?;
        // SAFETY: the kernel has just made this descriptor for us, nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn existing(&self, mode: VfioMode) -> Option<Arc<AddressSpace>> {
        lock(&self.spaces).get(&mode).and_then(Weak::upgrade)
    }

    /// The address space of `mode`, made by `make` if no port is in that mode yet.
    fn space(
        &self,
        mode: VfioMode,
        make: impl FnOnce() -> Result<AddressSpace>,
    ) -> Result<Arc<AddressSpace>> {
        let mut spaces = lock(&self.spaces);
        if let Some(space) = spaces.get(&mode).and_then(Weak::upgrade) {
            return Ok(space);
        }
        let mixed = |other: &VfioMode| other.has_iommu() != mode.has_iommu();
        if let Some((other, _)) =
            spaces.iter().find(|(other, space)| mixed(other) && space.strong_count() > 0)
        {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("cannot mix --vfio-mode {mode} with {other}"),
                "a NIC without IOMMU uses physical addresses, the others reach only what is mapped for them",
            )
            .mend("give every port a mode with an IOMMU, or every port one without"));
        }
        let space = Arc::new(make()?);
        spaces.insert(mode, Arc::downgrade(&space));
        Ok(space)
    }
}

/// Prefix of the nodes of devices without an IOMMU, groups and cdevs.
const NOIOMMU_PREFIX: &str = "noiommu-";

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Both maps are changed by single insertions, so a panic elsewhere leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn set_iommu(container: &OwnedFd, iommu: u32) -> Result<()> {
    let what = "cannot give the container an IOMMU";
    // SAFETY: this ioctl has no argument.
    let version = counted(unsafe { sys::get_api_version(container.as_raw_fd()) })
        .map_err(|errno| Error::os(what, errno))?;
    if version != uapi::VFIO_API_VERSION as i32 {
        return Err(Error::new(
            ErrorKind::Unavailable,
            what,
            format!("the kernel speaks VFIO API {version}, not 0"),
        ));
    }
    // SAFETY: the argument is an integer.
    counted(unsafe { sys::set_iommu(container.as_raw_fd(), iommu as i32) }).map(drop).map_err(|errno| {
        let error = Error::os(what, errno);
        match errno {
            Errno::ENODEV => error
                .because("the kernel has no driver for this IOMMU type (CONFIG_VFIO_IOMMU_TYPE1)")
                .mend("run: modprobe vfio_iommu_type1, or choose --vfio-mode cdev"),
            Errno::EPERM => diagnose::unsafe_interrupts(error),
            _ => error,
        }
    })
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new().read(true).write(true).open(path).map_err(|error| {
        let error = Error::io(format!("cannot open {}", path.display()), &error);
        match error.errno() {
            Some(Errno::EACCES) => error.mend(diagnose::permission(path)),
            _ => error,
        }
    })
}

/// Number of the device's IOMMU group.
pub(super) fn group_of(node: &Node) -> std::io::Result<u32> {
    let link = fs::read_link(node.sysfs.join("iommu_group"))?;
    link.file_name()
        .and_then(|name| name.to_str()?.parse().ok())
        .ok_or_else(|| std::io::Error::other("the link ends in no number"))
}

/// Name of the device's character device below `/dev/vfio/devices`.
pub(super) fn cdev_name(node: &Node) -> Option<String> {
    fs::read_dir(node.sysfs.join("vfio-dev"))
        .ok()?
        .flatten()
        .find_map(|entry| entry.file_name().into_string().ok())
}

fn no_group(what: String) -> Error {
    let error =
        Error::new(ErrorKind::Unavailable, what, "the device is in no IOMMU group, so the IOMMU is off");
    match fs::read_to_string("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode") {
        Ok(enabled) if enabled.trim() == "N" => error.mend(
            "boot with intel_iommu=on or amd_iommu=on; or, unsafe: echo 1 > /sys/module/vfio/parameters/enable_unsafe_noiommu_mode, bind again, --vfio-mode noiommu",
        ),
        _ => error.mend("boot with intel_iommu=on or amd_iommu=on"),
    }
}

fn needs_noiommu(what: String, mode: VfioMode) -> Error {
    Error::new(ErrorKind::Unavailable, what, "the device has no IOMMU").mend(format!(
        "turn the IOMMU on (intel_iommu=on), or accept that the NIC can reach all memory: --vfio-mode {mode}"
    ))
}

fn has_iommu(what: String) -> Error {
    Error::new(
        ErrorKind::Unavailable,
        what,
        "the device has an IOMMU, and the kernel then offers no other way",
    )
    .mend("use --vfio-mode cdev or container")
}

/// Stop-watch of the acquisition.
struct Phases {
    since: Instant,
    done: Vec<Phase>,
}

impl Phases {
    fn start() -> Self {
        Self { since: Instant::now(), done: Vec::with_capacity(3) }
    }

    fn end(&mut self, name: &'static str) {
        let now = Instant::now();
        self.done.push(Phase { name, took: now - self.since });
        self.since = now;
    }
}
