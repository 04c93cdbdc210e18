//! Typed interface to Linux's iommufd (`/dev/iommu`): I/O address spaces and page tables that devices are attached to.
//!
//! The crate does not depend on VFIO or PCI. VFIO character devices, vDPA and tests without a device need
//! only an object's id.
//!
//! | Type | Kernel object | Operations |
//! |---|---|---|
//! | [`Iommufd`] | the open `/dev/iommu` | open, options, [hardware properties](Iommufd::hw_info), [change of process](Iommufd::change_process) |
//! | [`Ioas`] | `IOAS` | IOVA ranges, map, map by file, copy, unmap |
//! | [`Mapping`] | part of an `IOAS` | unmap on drop, physical addresses without an IOMMU |
//! | [`Hwpt`] | `HWPT_PAGING`, `HWPT_NESTED` | nesting, invalidation, dirty tracking |
//! | [`FaultQueue`] | `FAULT` | page faults and responses |
//! | [`Viommu`], [`Vdevice`], [`EventQueue`], [`HwQueue`] | `VIOMMU`, `VDEVICE`, `VEVENTQ`, `HW_QUEUE` | IOMMU of a virtual machine |
//!
//! The crate covers `include/uapi/linux/iommufd.h` of Linux 7.1 and `IOMMU_IOAS_NOIOMMU_GET_PA` of Linux 7.3.
//!
//! ```no_run
//! use std::ptr::NonNull;
//! use vireo_iommufd::{Access, Iommufd};
//!
//! # fn main() -> vireo_iommufd::Result<()> {
//! let ioas = Iommufd::open()?.ioas_alloc()?;
//! let iovas = ioas.iova_ranges()?;
//! println!("{:x?}, aligned to {} bytes", iovas.ranges, iovas.alignment);
//!
//! // Memory that the program never gives back, and reaches by raw pointers only.
//! let layout = std::alloc::Layout::from_size_align(2 << 20, 2 << 20).expect("a power of two");
//! // SAFETY: the layout has a size.
//! let memory = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).expect("2 MiB");
//! let memory = NonNull::slice_from_raw_parts(memory, layout.size());
//! // SAFETY: the memory is never freed, and no reference to it exists.
//! let mapping = unsafe { ioas.map_user(memory, (), Some(4 << 30), Access::ReadWrite) }?;
//! assert_eq!(mapping.iova(), 4 << 30);
//! # Ok(())
//! # }
//! ```
//!
//! Objects are destroyed on drop. Each object holds an `Arc` of the objects it depends on, so the order of
//! destruction is one that the kernel accepts: a [`Mapping`] is unmapped before its [`Ioas`] is destroyed,
//! and the [`Ioas`] is destroyed before the descriptor closes.
//!
//! Devices are not among these objects. A program that binds a device through the device's own descriptor
//! gets a [`DeviceId`], and must detach and close the device before it drops the page table. Otherwise the
//! kernel refuses to destroy the table (`EBUSY`), and an error is logged.

mod dirty;
mod error;
mod events;
mod fault;
mod hw_info;
mod hwpt;
mod ioas;
mod iommufd;
#[cfg(test)]
mod kernel;
mod mapping;
mod object;
mod observe;
mod queue;
mod sys;
mod viommu;

pub use dirty::bitmap_words;
pub use error::{Error, Operation, Result};
pub use events::{Event, EventQueue, EventType};
pub use fault::{Fault, FaultGroup, FaultPermissions, FaultQueue, PageResponse};
pub use hw_info::{HwCapabilities, HwInfo, HwInfoType};
pub use hwpt::{Hwpt, HwptDataType, HwptFlags, HwptOptions, InvalidationType};
pub use ioas::{Access, Ioas, Iovas, Memory};
pub use iommufd::{Accounting, DeviceId, Iommufd, PATH, WeakIommufd};
pub use mapping::{Mapping, Physical};
pub use observe::{Observer, Outcome, observe, observed};
pub use viommu::{HwQueue, HwQueueType, Vdevice, Viommu, ViommuType};

pub use nix::errno::Errno;

/// Defines a type for a kernel number that may have more values in later kernels.
macro_rules! open_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$value_doc:meta])* $value:ident = $number:ident,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct $name(pub u32);

        impl $name {
            $($(#[$value_doc])* pub const $value: Self = Self(crate::sys::$number);)*
        }
    };
}
pub(crate) use open_enum;
