//! Virtual IOMMUs: slices of a physical IOMMU, one per virtual machine.

use std::sync::Arc;

use crate::error::{Operation, Result};
use crate::hwpt::{self, length};
use crate::object::Object;
use crate::{DeviceId, EventQueue, EventType, Hwpt, HwptOptions, InvalidationType, Iommufd, open_enum, sys};

open_enum! {
    /// Type of a virtual IOMMU (`enum iommu_viommu_type`).
    ViommuType {
        /// An SMMUv3.
        ARM_SMMUV3 = iommu_viommu_type_IOMMU_VIOMMU_TYPE_ARM_SMMUV3,
        /// An SMMUv3 with NVIDIA's command queues; its data is `struct iommu_viommu_tegra241_cmdqv`.
        TEGRA241_CMDQV = iommu_viommu_type_IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV,
    }
}

open_enum! {
    /// Type of a hardware queue (`enum iommu_hw_queue_type`).
    HwQueueType {
        /// Command queue of a virtual IOMMU of type [`ViommuType::TEGRA241_CMDQV`].
        TEGRA241_CMDQV = iommu_hw_queue_type_IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV,
    }
}

/// A virtual IOMMU, destroyed on drop. It keeps its parent page table alive.
#[derive(Debug)]
pub struct Viommu {
    object: Object,
    _parent: Arc<Hwpt>,
}

impl Viommu {
    pub(crate) fn alloc(
        parent: &Arc<Hwpt>,
        device: DeviceId,
        kind: ViommuType,
        data: &mut [u8],
    ) -> Result<Arc<Self>> {
        let operation = Operation::AllocateViommu;
        let mut alloc = sys::iommu_viommu_alloc {
            type_: kind.0,
            dev_id: device.0,
            hwpt_id: parent.id(),
            data_len: length(data.len(), operation)?,
            data_uptr: if data.is_empty() { 0 } else { data.as_mut_ptr() as u64 },
            ..Default::default()
        };
        // SAFETY: the kernel reads and writes at most `data_len` bytes, which is the length of the slice at
        // that address.
        unsafe { parent.iommufd().call(&mut alloc) }.map_err(|errno| operation.failed(errno))?;
        let object = Object::new(parent.iommufd(), alloc.out_viommu_id, "virtual IOMMU");
        Ok(Arc::new(Self { object, _parent: Arc::clone(parent) }))
    }

    /// Returns the object id.
    pub fn id(&self) -> u32 {
        self.object.id()
    }

    /// Returns the iommufd that the object belongs to.
    pub fn iommufd(&self) -> &Iommufd {
        self.object.iommufd()
    }

    /// Allocates a nested table for `device`, as [`Hwpt::nested_alloc`] does.
    ///
    /// # Errors
    /// As for [`Hwpt::nested_alloc`].
    pub fn hwpt_alloc(self: &Arc<Self>, device: DeviceId, options: &HwptOptions<'_>) -> Result<Arc<Hwpt>> {
        Hwpt::of_viommu(self, device, options)
    }

    /// Invalidates IOMMU cache entries of this virtual machine, as [`Hwpt::invalidate`] does.
    ///
    /// # Errors
    /// As for [`Hwpt::invalidate`].
    pub fn invalidate<const LEN: usize>(&self, kind: InvalidationType, requests: &[[u8; LEN]]) -> Result<()> {
        hwpt::invalidate(&self.object, kind, requests)
    }

    /// Registers `virtual_id` as the id of `device` in the virtual machine (`IOMMU_VDEVICE_ALLOC`). Depending
    /// on the type of the IOMMU, it is a stream id, device id or requester id.
    ///
    /// Drop the returned value before the device's own descriptor is closed. Otherwise its object id stays in
    /// use until the iommufd closes.
    ///
    /// # Errors
    /// `EEXIST` when `virtual_id` is in use or `device` already has a virtual id.
    pub fn vdevice_alloc(self: &Arc<Self>, device: DeviceId, virtual_id: u64) -> Result<Vdevice> {
        let mut alloc = sys::iommu_vdevice_alloc {
            viommu_id: self.id(),
            dev_id: device.0,
            virt_id: virtual_id,
            ..Default::default()
        };
        // SAFETY: the argument has no addresses.
        unsafe { self.iommufd().call(&mut alloc) }
            .map_err(|errno| Operation::AllocateVdevice.failed(errno))?;
        let object = Object::new(self.iommufd(), alloc.out_vdevice_id, "virtual device");
        Ok(Vdevice { object, _viommu: Arc::clone(self) })
    }

    /// Allocates a queue for at most `depth` events of the virtual IOMMU (`IOMMU_VEVENTQ_ALLOC`). A virtual
    /// IOMMU has at most one queue of each type.
    ///
    /// # Errors
    /// `EEXIST` when a queue of that type exists, `EOPNOTSUPP` when the IOMMU has no event queues.
    pub fn event_queue_alloc(self: &Arc<Self>, kind: EventType, depth: u32) -> Result<EventQueue> {
        EventQueue::alloc(self, kind, depth)
    }

    /// Allocates hardware queue `index` of type `kind`, which the hardware serves by itself
    /// (`IOMMU_HW_QUEUE_ALLOC`). The queue consists of the `len` bytes at `iova` in the address space of the
    /// parent page table. Queues must be allocated in ascending order of their indices and dropped in
    /// descending order. The kernel keeps the memory pinned.
    ///
    /// # Errors
    /// When the IOMMU does not support such queues, or the memory is not mapped, aligned or contiguous as required.
    pub fn hw_queue_alloc(
        self: &Arc<Self>,
        kind: HwQueueType,
        index: u32,
        iova: u64,
        len: u64,
    ) -> Result<HwQueue> {
        let mut alloc = sys::iommu_hw_queue_alloc {
            viommu_id: self.id(),
            type_: kind.0,
            index,
            nesting_parent_iova: iova,
            length: len,
            ..Default::default()
        };
        // SAFETY: the argument has no addresses of this process.
        unsafe { self.iommufd().call(&mut alloc) }
            .map_err(|errno| Operation::AllocateHwQueue.failed(errno))?;
        let object = Object::new(self.iommufd(), alloc.out_hw_queue_id, "hardware queue");
        Ok(HwQueue { object, _viommu: Arc::clone(self) })
    }
}

/// Registration of a device in a virtual machine, destroyed on drop.
#[must_use = "dropping it removes the device's virtual id"]
#[derive(Debug)]
pub struct Vdevice {
    object: Object,
    _viommu: Arc<Viommu>,
}

impl Vdevice {
    /// Returns the object id.
    pub fn id(&self) -> u32 {
        self.object.id()
    }
}

/// A virtual machine's queue that is served by the hardware, destroyed on drop.
#[must_use = "dropping it stops the hardware from serving the queue"]
#[derive(Debug)]
pub struct HwQueue {
    object: Object,
    _viommu: Arc<Viommu>,
}

impl HwQueue {
    /// Returns the object id.
    pub fn id(&self) -> u32 {
        self.object.id()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HwptFlags;
    use crate::kernel::{mock_kernel, read, write};
    use std::cell::RefCell;
    use std::rc::Rc;

    #[test]
    fn what_belongs_to_a_virtual_iommu_keeps_it() {
        let log = Rc::<RefCell<Vec<String>>>::default();
        let (seen, mut id) = (Rc::clone(&log), 10);
        let iommufd = mock_kernel(move |name, bytes| {
            id += 1;
            seen.borrow_mut().push(match name {
                "IOMMU_HWPT_ALLOC" => {
                    let alloc: sys::iommu_hwpt_alloc = read(bytes);
                    write(bytes, &sys::iommu_hwpt_alloc { out_hwpt_id: id, ..alloc });
                    format!("table {id} in {}", alloc.pt_id)
                }
                "IOMMU_VIOMMU_ALLOC" => {
                    let alloc: sys::iommu_viommu_alloc = read(bytes);
                    write(bytes, &sys::iommu_viommu_alloc { out_viommu_id: id, ..alloc });
                    // SAFETY: the argument states that `data_len` bytes may be written at that address.
                    unsafe { *(alloc.data_uptr as *mut u8).add(alloc.data_len as usize - 1) = 9 };
                    format!("viommu {id} of type {} in {} on {}", alloc.type_, alloc.hwpt_id, alloc.dev_id)
                }
                "IOMMU_VDEVICE_ALLOC" => {
                    let alloc: sys::iommu_vdevice_alloc = read(bytes);
                    write(bytes, &sys::iommu_vdevice_alloc { out_vdevice_id: id, ..alloc });
                    format!("vdevice {id} is {:#x} in {}", alloc.virt_id, alloc.viommu_id)
                }
                "IOMMU_HW_QUEUE_ALLOC" => {
                    let alloc: sys::iommu_hw_queue_alloc = read(bytes);
                    write(bytes, &sys::iommu_hw_queue_alloc { out_hw_queue_id: id, ..alloc });
                    let (index, iova, len) = (alloc.index, alloc.nesting_parent_iova, alloc.length);
                    format!("queue {id} is {index} at {iova:#x}+{len} in {}", alloc.viommu_id)
                }
                "IOMMU_HWPT_INVALIDATE" => {
                    let asked: sys::iommu_hwpt_invalidate = read(bytes);
                    format!("invalidate {} by {}", asked.hwpt_id, asked.entry_num)
                }
                _ => format!("destroy {}", read::<sys::iommu_destroy>(bytes).id),
            });
            Ok(())
        });
        // SAFETY: the test answers the ioctls, so no kernel object is involved.
        let ioas = unsafe { iommufd.ioas_from_id(5) };
        let device = DeviceId(3);
        let parent = ioas.hwpt_alloc(device, &HwptOptions::new(HwptFlags::NEST_PARENT)).unwrap();
        let mut data = [0; 16];
        let viommu = parent.viommu_alloc(device, ViommuType::TEGRA241_CMDQV, &mut data).unwrap();
        assert_eq!(data[15], 9);
        let vdevice = viommu.vdevice_alloc(device, 0x42).unwrap();
        let nested = viommu.hwpt_alloc(device, &HwptOptions::default()).unwrap();
        let queue = viommu.hw_queue_alloc(HwQueueType::TEGRA241_CMDQV, 0, 1 << 20, 4096).unwrap();
        viommu.invalidate(InvalidationType::ARM_SMMUV3, &[[0; 16]; 3]).unwrap();
        assert_eq!((vdevice.id(), nested.id(), queue.id()), (13, 14, 15));
        drop((viommu, parent));
        drop((vdevice, nested, queue));
        let wanted = [
            "table 11 in 5",
            "viommu 12 of type 2 in 11 on 3",
            "vdevice 13 is 0x42 in 12",
            "table 14 in 12",
            "queue 15 is 0 at 0x100000+4096 in 12",
            "invalidate 12 by 3",
            "destroy 13",
            "destroy 14",
            "destroy 15",
            "destroy 12",
            "destroy 11",
        ];
        assert_eq!(*log.borrow(), wanted);
    }
}
