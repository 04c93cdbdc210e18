//! Events of a virtual IOMMU, to be delivered to the virtual machine.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use crate::error::{Error, Operation, Result};
use crate::object::Object;
use crate::queue::{read_all, word};
use crate::{Viommu, sys};

/// Type of events (`enum iommu_veventq_type`), with the size of its structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EventType {
    number: u32,
    /// Size in bytes of the structure that follows each header.
    len: usize,
}

impl EventType {
    /// Event records of an SMMUv3 (`struct iommu_vevent_arm_smmuv3`).
    pub const ARM_SMMUV3: Self = Self::new(
        sys::iommu_veventq_type_IOMMU_VEVENTQ_TYPE_ARM_SMMUV3,
        size_of::<sys::iommu_vevent_arm_smmuv3>(),
    );
    /// Errors of NVIDIA Tegra241 command queues (`struct iommu_vevent_tegra241_cmdqv`).
    pub const TEGRA241_CMDQV: Self = Self::new(
        sys::iommu_veventq_type_IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV,
        size_of::<sys::iommu_vevent_tegra241_cmdqv>(),
    );

    /// Creates the type with this `number`, whose structure has `len` bytes. Intended for types of later kernels.
    pub const fn new(number: u32, len: usize) -> Self {
        Self { number, len }
    }
}

/// An event, or a report that events were lost.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// An event.
    Data {
        /// Sequence number. A gap of `n` numbers after the previous event means that `n` events were lost.
        /// The number wraps from `i32::MAX` to 0.
        sequence: u32,
        /// Bytes of the event type's structure.
        data: Vec<u8>,
    },
    /// Events were lost because the queue was full.
    Lost {
        /// Sequence number of the last lost event.
        sequence: u32,
    },
}

/// Event queue of a virtual IOMMU, destroyed on drop. Its descriptor is readable while events are pending.
#[derive(Debug)]
pub struct EventQueue {
    /// Closed before the object is destroyed: the kernel refuses to destroy it while the file is open.
    file: OwnedFd,
    _object: Object,
    kind: EventType,
    _viommu: Arc<Viommu>,
}

/// Number of events that fit into the initial buffer.
const EVENTS: usize = 64;
const HEADER: usize = size_of::<sys::iommufd_vevent_header>();

impl EventQueue {
    pub(crate) fn alloc(viommu: &Arc<Viommu>, kind: EventType, depth: u32) -> Result<Self> {
        let mut alloc = sys::iommu_veventq_alloc {
            viommu_id: viommu.id(),
            type_: kind.number,
            veventq_depth: depth,
            ..Default::default()
        };
        // SAFETY: the argument has no addresses.
        unsafe { viommu.iommufd().call(&mut alloc) }
            .map_err(|errno| Operation::AllocateEventQueue.failed(errno))?;
        // SAFETY: the kernel has just installed this descriptor, and nothing else owns it.
        let file = unsafe { OwnedFd::from_raw_fd(alloc.out_veventq_fd as RawFd) };
        let object = Object::new(viommu.iommufd(), alloc.out_veventq_id, "event queue");
        Ok(Self { file, _object: object, kind, _viommu: Arc::clone(viommu) })
    }

    /// Reads the pending events, if any, and returns immediately. To wait for events, poll the descriptor.
    ///
    /// # Errors
    /// When the read fails or returns an incomplete event.
    pub fn read(&self) -> Result<Vec<Event>> {
        let operation = Operation::ReadEvents;
        let bytes = read_all(&self.file, EVENTS * (HEADER + self.kind.len), operation)?;
        events(&bytes, self.kind.len)
            .ok_or(Error::Protocol { operation, why: "the kernel returned an incomplete event" })
    }
}

impl AsFd for EventQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Parses events, each a header and `len` bytes. The header of lost events is followed by no bytes. Returns
/// `None` if the last event is incomplete.
fn events(mut bytes: &[u8], len: usize) -> Option<Vec<Event>> {
    let mut events = Vec::new();
    while !bytes.is_empty() {
        let (header, rest) = bytes.split_at_checked(HEADER)?;
        let sequence = word(header, 4);
        if word(header, 0) & sys::iommu_veventq_flag_IOMMU_VEVENTQ_FLAG_LOST_EVENTS != 0 {
            events.push(Event::Lost { sequence });
            bytes = rest;
            continue;
        }
        let (data, rest) = rest.split_at_checked(len)?;
        events.push(Event::Data { sequence, data: data.into() });
        bytes = rest;
    }
    Some(events)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{is_closed, mock_kernel, read, write};
    use crate::{DeviceId, HwptOptions, ViommuType};
    use std::io::Write;
    use std::os::fd::IntoRawFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn events_and_gaps_are_told_apart() {
        let header = |flags: u32, sequence: u32| [flags, sequence].map(u32::to_ne_bytes).concat();
        let bytes = [header(0, 3), vec![1; 16], header(1, 7), header(0, 8), vec![2; 16]].concat();
        let wanted = [
            Event::Data { sequence: 3, data: vec![1; 16] },
            Event::Lost { sequence: 7 },
            Event::Data { sequence: 8, data: vec![2; 16] },
        ];
        assert_eq!(events(&bytes, 16).unwrap(), wanted);
        for short in [1, 7, 15, 16, 17, 23] {
            assert_eq!(events(&bytes[..bytes.len() - short], 16), None, "{short}");
        }
        assert_eq!(events(&[], 16), Some(vec![]));
    }

    #[test]
    fn a_queue_is_allocated_by_its_type_and_read() {
        let (ours, mut kernel) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let (mut ours, other_end) = (Some(ours), kernel.try_clone().unwrap());
        let iommufd = mock_kernel(move |name, bytes| {
            if name == "IOMMU_VEVENTQ_ALLOC" {
                let mut alloc: sys::iommu_veventq_alloc = read(bytes);
                assert_eq!((alloc.size, alloc.type_, alloc.veventq_depth), (32, 2, 128));
                alloc.out_veventq_fd = ours.take().unwrap().into_raw_fd() as u32;
                alloc.out_veventq_id = 6;
                write(bytes, &alloc);
            }
            if name == "IOMMU_DESTROY" && read::<sys::iommu_destroy>(bytes).id == 6 {
                assert!(is_closed(&other_end));
            }
            Ok(())
        });
        // SAFETY: the test answers the ioctls, so no kernel object is involved.
        let ioas = unsafe { iommufd.ioas_from_id(1) };
        let hwpt = ioas.hwpt_alloc(DeviceId(1), &HwptOptions::default()).unwrap();
        let viommu = hwpt.viommu_alloc(DeviceId(1), ViommuType::TEGRA241_CMDQV, &mut []).unwrap();
        let queue = viommu.event_queue_alloc(EventType::TEGRA241_CMDQV, 128).unwrap();
        assert_eq!(queue.read(), Ok(vec![]));
        kernel.write_all(&[0; 24]).unwrap();
        assert_eq!(queue.read(), Ok(vec![Event::Data { sequence: 0, data: vec![0; 16] }]));
        kernel.write_all(&[0; 23]).unwrap();
        assert!(matches!(queue.read(), Err(Error::Protocol { .. })));
    }
}
