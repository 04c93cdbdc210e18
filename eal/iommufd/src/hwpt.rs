//! Hardware page tables: tables of an address space, filled by the kernel, and nested tables, filled by a
//! virtual machine.

use std::sync::Arc;

use bitflags::bitflags;

use crate::error::{Error, Operation, Result};
use crate::object::Object;
use crate::{DeviceId, FaultQueue, Ioas, Iommufd, Viommu, ViommuType, open_enum, sys};

bitflags! {
    /// Features that a hardware page table must support.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct HwptFlags: u32 {
        /// The table can be the parent of nested tables.
        const NEST_PARENT = sys::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_NEST_PARENT;
        /// The table tracks the pages that devices write.
        const DIRTY_TRACKING = sys::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_DIRTY_TRACKING;
        /// The table can be attached to a PASID of a device.
        const PASID = sys::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_PASID;
    }
}

open_enum! {
    /// Type of the data that describes a nested page table (`enum iommu_hwpt_data_type`).
    HwptDataType {
        /// `struct iommu_hwpt_vtd_s1`: a first-stage table of Intel VT-d.
        VTD_S1 = iommu_hwpt_data_type_IOMMU_HWPT_DATA_VTD_S1,
        /// `struct iommu_hwpt_arm_smmuv3`: a stream table entry of an SMMUv3.
        ARM_SMMUV3 = iommu_hwpt_data_type_IOMMU_HWPT_DATA_ARM_SMMUV3,
        /// `struct iommu_hwpt_amd_guest`: a device table entry of an AMD IOMMU.
        AMD_GUEST = iommu_hwpt_data_type_IOMMU_HWPT_DATA_AMD_GUEST,
    }
}

open_enum! {
    /// Type of invalidation requests (`enum iommu_hwpt_invalidate_data_type`).
    InvalidationType {
        /// `struct iommu_hwpt_vtd_s1_invalidate`, for a nested table.
        VTD_S1 = iommu_hwpt_invalidate_data_type_IOMMU_HWPT_INVALIDATE_DATA_VTD_S1,
        /// `struct iommu_viommu_arm_smmuv3_invalidate`, for a virtual IOMMU.
        ARM_SMMUV3 = iommu_hwpt_invalidate_data_type_IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3,
    }
}

/// Options for the allocation of a hardware page table.
#[must_use]
#[derive(Clone, Copy, Debug, Default)]
pub struct HwptOptions<'a> {
    flags: HwptFlags,
    data: Option<(HwptDataType, &'a [u8])>,
    faults: Option<&'a Arc<FaultQueue>>,
}

impl<'a> HwptOptions<'a> {
    /// Creates options for a table that supports `flags`.
    pub fn new(flags: HwptFlags) -> Self {
        Self { flags, ..Self::default() }
    }

    /// Sets the structure of type `kind` that describes a nested table.
    pub fn data(self, kind: HwptDataType, data: &'a [u8]) -> Self {
        Self { data: Some((kind, data)), ..self }
    }

    /// Sets the queue for page faults of the table's devices.
    pub fn faults(self, queue: &'a Arc<FaultQueue>) -> Self {
        Self { faults: Some(queue), ..self }
    }
}

/// Object that a table was allocated from. It must outlive the table.
#[derive(Debug)]
enum Parent {
    Ioas { _ioas: Arc<Ioas> },
    Hwpt { _hwpt: Arc<Hwpt> },
    Viommu { _viommu: Arc<Viommu> },
}

/// A hardware page table, destroyed on drop. It keeps its parent and its fault queue alive.
#[derive(Debug)]
pub struct Hwpt {
    object: Object,
    _parent: Parent,
    _faults: Option<Arc<FaultQueue>>,
}

impl Hwpt {
    pub(crate) fn of_ioas(
        ioas: &Arc<Ioas>,
        device: DeviceId,
        options: &HwptOptions<'_>,
    ) -> Result<Arc<Self>> {
        Self::alloc(ioas.iommufd(), ioas.id(), Parent::Ioas { _ioas: Arc::clone(ioas) }, device, options)
    }

    pub(crate) fn of_viommu(
        viommu: &Arc<Viommu>,
        device: DeviceId,
        options: &HwptOptions<'_>,
    ) -> Result<Arc<Self>> {
        let parent = Parent::Viommu { _viommu: Arc::clone(viommu) };
        Self::alloc(viommu.iommufd(), viommu.id(), parent, device, options)
    }

    fn alloc(
        iommufd: &Iommufd,
        pt_id: u32,
        parent: Parent,
        device: DeviceId,
        options: &HwptOptions<'_>,
    ) -> Result<Arc<Self>> {
        let operation = Operation::AllocateHwpt;
        if options.faults.is_some_and(|faults| !faults.iommufd().is_same(iommufd)) {
            return Err(Error::OtherIommufd { operation });
        }
        let fault_flag = sys::iommufd_hwpt_alloc_flags_IOMMU_HWPT_FAULT_ID_VALID;
        let mut alloc = sys::iommu_hwpt_alloc {
            flags: options.flags.bits() | options.faults.map_or(0, |_| fault_flag),
            dev_id: device.0,
            pt_id,
            data_type: options
                .data
                .map_or(sys::iommu_hwpt_data_type_IOMMU_HWPT_DATA_NONE, |(kind, _)| kind.0),
            data_len: length(options.data.map_or(0, |(_, data)| data.len()), operation)?,
            data_uptr: options.data.map_or(0, |(_, data)| data.as_ptr() as u64),
            fault_id: options.faults.map_or(0, |faults| faults.id()),
            ..Default::default()
        };
        // SAFETY: the kernel reads `data_len` bytes, which is the length of the slice at that address.
        unsafe { iommufd.call(&mut alloc) }.map_err(|errno| operation.failed(errno))?;
        let object = Object::new(iommufd, alloc.out_hwpt_id, "hardware page table");
        Ok(Arc::new(Self { object, _parent: parent, _faults: options.faults.cloned() }))
    }

    /// Returns the object id, by which devices are attached.
    pub fn id(&self) -> u32 {
        self.object.id()
    }

    /// Returns the iommufd that the object belongs to.
    pub fn iommufd(&self) -> &Iommufd {
        self.object.iommufd()
    }

    /// Allocates a nested table for `device` (`IOMMU_HWPT_ALLOC`). A virtual machine fills the nested table,
    /// and this table translates the resulting addresses. This table must have [`HwptFlags::NEST_PARENT`],
    /// and `options` must have [data](HwptOptions::data).
    ///
    /// # Errors
    /// `EOPNOTSUPP` or `EINVAL` when the IOMMU does not support nesting or does not accept the data.
    pub fn nested_alloc(self: &Arc<Self>, device: DeviceId, options: &HwptOptions<'_>) -> Result<Arc<Self>> {
        let parent = Parent::Hwpt { _hwpt: Arc::clone(self) };
        Self::alloc(self.iommufd(), self.id(), parent, device, options)
    }

    /// Allocates a virtual IOMMU on the IOMMU behind `device` (`IOMMU_VIOMMU_ALLOC`). This table becomes the
    /// parent of the virtual IOMMU's nested tables. `data` is the structure of type `kind`, or empty if the
    /// type has none. The kernel writes its response into `data`.
    ///
    /// # Errors
    /// `EOPNOTSUPP` when the IOMMU does not support virtualization of that type.
    pub fn viommu_alloc(
        self: &Arc<Self>,
        device: DeviceId,
        kind: ViommuType,
        data: &mut [u8],
    ) -> Result<Arc<Viommu>> {
        Viommu::alloc(self, device, kind, data)
    }

    /// Invalidates IOMMU cache entries of a nested table (`IOMMU_HWPT_INVALIDATE`). Each request holds the
    /// bytes of a structure of type `kind`. Without requests, the call only checks that the kernel supports
    /// the type.
    ///
    /// # Errors
    /// [`Error::Invalidate`] with the number of requests that the kernel handled before one failed.
    pub fn invalidate<const LEN: usize>(&self, kind: InvalidationType, requests: &[[u8; LEN]]) -> Result<()> {
        invalidate(&self.object, kind, requests)
    }
}

/// Implements [`Hwpt::invalidate`] for nested tables and virtual IOMMUs.
pub(crate) fn invalidate<const LEN: usize>(
    object: &Object,
    kind: InvalidationType,
    requests: &[[u8; LEN]],
) -> Result<()> {
    let mut invalidate = sys::iommu_hwpt_invalidate {
        hwpt_id: object.id(),
        data_uptr: requests.as_ptr() as u64,
        data_type: kind.0,
        entry_len: length(LEN, Operation::Invalidate)?,
        entry_num: length(requests.len(), Operation::Invalidate)?,
        ..Default::default()
    };
    // SAFETY: the kernel reads `entry_num` entries of `entry_len` bytes, which is the size of the slice at
    // that address.
    unsafe { object.iommufd().call(&mut invalidate) }
        // If the call fails before the kernel handles any request, the kernel leaves the count unchanged.
        .map_err(|errno| Error::Invalidate {
            handled: Some(invalidate.entry_num as usize)
                .filter(|handled| *handled < requests.len())
                .unwrap_or(0),
            errno,
        })
}

/// Converts a length to the kernel's type.
pub(crate) fn length(len: usize, operation: Operation) -> Result<u32> {
    u32::try_from(len).map_err(|_| Error::Argument { operation, why: "the data is too long" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{mock_kernel, read, write};
    use nix::errno::Errno;
    use std::cell::RefCell;
    use std::rc::Rc;

    /// Returns the `len` bytes at `address`, both taken from an ioctl's argument.
    fn behind(address: u64, len: u32) -> Vec<u8> {
        // SAFETY: the argument states that `len` bytes may be read at `address`.
        unsafe { std::slice::from_raw_parts(address as *const u8, len as usize) }.to_vec()
    }

    #[test]
    fn a_nested_table_is_destroyed_before_its_parent() {
        let log = Rc::<RefCell<Vec<String>>>::default();
        let seen = Rc::clone(&log);
        let iommufd = mock_kernel(move |name, bytes| {
            seen.borrow_mut().push(match name {
                "IOMMU_HWPT_ALLOC" => {
                    let mut alloc: sys::iommu_hwpt_alloc = read(bytes);
                    alloc.out_hwpt_id = alloc.pt_id + 1;
                    write(bytes, &alloc);
                    let data = match alloc.data_len {
                        0 => Vec::new(),
                        len => behind(alloc.data_uptr, len),
                    };
                    format!(
                        "{} {:#b} on {} by {} {data:?}",
                        alloc.out_hwpt_id, alloc.flags, alloc.dev_id, alloc.data_type
                    )
                }
                "IOMMU_DESTROY" => format!("destroy {}", read::<sys::iommu_destroy>(bytes).id),
                other => other.into(),
            });
            Ok(())
        });
        // SAFETY: the test answers the ioctls, so no kernel object is involved.
        let ioas = unsafe { iommufd.ioas_from_id(5) };
        let device = DeviceId(3);
        let flags = HwptFlags::NEST_PARENT | HwptFlags::DIRTY_TRACKING;
        let parent = ioas.hwpt_alloc(device, &HwptOptions::new(flags)).unwrap();
        let options = HwptOptions::default().data(HwptDataType::VTD_S1, &[1, 2]);
        let nested = parent.nested_alloc(device, &options).unwrap();
        assert_eq!((parent.id(), nested.id()), (6, 7));
        drop(parent);
        drop(nested);
        assert_eq!(
            *log.borrow(),
            ["6 0b11 on 3 by 0 []", "7 0b0 on 3 by 1 [1, 2]", "destroy 7", "destroy 6"]
        );
    }

    #[test]
    fn an_invalidation_tells_how_far_it_came() {
        let iommufd = mock_kernel(|name, bytes| {
            if name != "IOMMU_HWPT_INVALIDATE" {
                return Ok(());
            }
            let mut asked: sys::iommu_hwpt_invalidate = read(bytes);
            if asked.data_type == 0 {
                return Err(Errno::ENOTTY);
            }
            assert_eq!((asked.size, asked.data_type, asked.entry_len), (32, 1, 16));
            let requests = behind(asked.data_uptr, asked.entry_num * asked.entry_len);
            asked.entry_num = requests.chunks(16).take_while(|request| request[0] != 0xff).count() as u32;
            write(bytes, &asked);
            if (asked.entry_num as usize) < requests.len() / 16 { Err(Errno::EIO) } else { Ok(()) }
        });
        // SAFETY: the test answers the ioctls, so no kernel object is involved.
        let ioas = unsafe { iommufd.ioas_from_id(5) };
        let hwpt = ioas.hwpt_alloc(DeviceId(1), &HwptOptions::default()).unwrap();
        assert_eq!(hwpt.invalidate(InvalidationType::ARM_SMMUV3, &[[1; 16]; 2]), Ok(()));
        let error = hwpt.invalidate(InvalidationType::VTD_S1, &[[1; 24]; 2]).unwrap_err();
        assert_eq!(error, Error::Invalidate { handled: 0, errno: Errno::ENOTTY });
        let error =
            hwpt.invalidate(InvalidationType::ARM_SMMUV3, &[[1; 16], [2; 16], [0xff; 16]]).unwrap_err();
        assert_eq!(error, Error::Invalidate { handled: 2, errno: Errno::EIO });
        assert!(error.to_string().ends_with("EIO (I/O error) after 2 successful requests"), "{error}");
    }
}
