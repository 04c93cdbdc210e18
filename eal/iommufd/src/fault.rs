//! Page faults of devices that wait for memory to be mapped (PCI page request interface).

use std::mem::offset_of;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use bitflags::bitflags;
use nix::unistd::write;

use crate::error::{Error, Operation, Result};
use crate::object::Object;
use crate::queue::{read_all, word};
use crate::{DeviceId, Iommufd, sys};

bitflags! {
    /// Access that a device requested (`enum iommu_hwpt_pgfault_perm`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct FaultPermissions: u32 {
        /// Read access.
        const READ = sys::iommu_hwpt_pgfault_perm_IOMMU_PGFAULT_PERM_READ;
        /// Write access.
        const WRITE = sys::iommu_hwpt_pgfault_perm_IOMMU_PGFAULT_PERM_WRITE;
        /// Execute access.
        const EXEC = sys::iommu_hwpt_pgfault_perm_IOMMU_PGFAULT_PERM_EXEC;
        /// Access in privileged mode.
        const PRIV = sys::iommu_hwpt_pgfault_perm_IOMMU_PGFAULT_PERM_PRIV;
        const _ = !0;
    }
}

/// One page fault (`struct iommu_hwpt_pgfault`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fault {
    /// Device that caused the fault.
    pub device: DeviceId,
    /// Process address space ID (PASID), if the request had one.
    pub pasid: Option<u32>,
    /// Index of the page request group.
    pub group: u32,
    /// Access that the device requested.
    pub permissions: FaultPermissions,
    /// IOVA of the access.
    pub address: u64,
    /// Number of bytes that the device is about to access; 0 if the device does not report it.
    pub len: u32,
}

/// Page faults that are answered by a single response.
#[must_use = "the device waits until `FaultQueue::respond` is called"]
#[derive(Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FaultGroup {
    cookie: u32,
    /// Faults of the group, in the order of the requests.
    pub faults: Vec<Fault>,
}

/// Response to a group of faults (`enum iommufd_page_response_code`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageResponse {
    /// The memory is now mapped, and the device retries the access.
    Success,
    /// The access is invalid, and the device does not retry it.
    Invalid,
}

/// Queue for the page faults of devices whose page tables use it
/// ([`HwptOptions::faults`](crate::HwptOptions::faults)). Its descriptor is readable while faults are
/// pending. When the queue is dropped, the kernel answers the remaining faults with
/// [`PageResponse::Invalid`].
#[derive(Debug)]
pub struct FaultQueue {
    /// Closed before the object is destroyed: the kernel refuses to destroy it while the file is open.
    file: OwnedFd,
    object: Object,
}

/// Number of faults that fit into the initial buffer.
const FAULTS: usize = 64;
const FAULT: usize = size_of::<sys::iommu_hwpt_pgfault>();

impl FaultQueue {
    pub(crate) fn alloc(iommufd: &Iommufd) -> Result<Arc<Self>> {
        let mut alloc = sys::iommu_fault_alloc::default();
        // SAFETY: the argument has no addresses.
        unsafe { iommufd.call(&mut alloc) }.map_err(|errno| Operation::AllocateFaultQueue.failed(errno))?;
        // SAFETY: the kernel has just installed this descriptor, and nothing else owns it.
        let file = unsafe { OwnedFd::from_raw_fd(alloc.out_fault_fd as RawFd) };
        Ok(Arc::new(Self { file, object: Object::new(iommufd, alloc.out_fault_id, "fault queue") }))
    }

    pub(crate) fn id(&self) -> u32 {
        self.object.id()
    }

    pub(crate) fn iommufd(&self) -> &Iommufd {
        self.object.iommufd()
    }

    /// Reads the pending groups, if any, and returns immediately. To wait for faults, poll the descriptor.
    ///
    /// # Errors
    /// When the read fails or returns an incomplete fault.
    pub fn read(&self) -> Result<Vec<FaultGroup>> {
        let bytes = read_all(&self.file, FAULTS * FAULT, Operation::ReadFaults)?;
        if !bytes.len().is_multiple_of(FAULT) {
            let operation = Operation::ReadFaults;
            return Err(Error::Protocol { operation, why: "the kernel returned an incomplete fault" });
        }
        Ok(groups(&bytes))
    }

    /// Responds to a group of faults.
    ///
    /// # Errors
    /// `EINVAL` when the kernel has already responded because the device was detached.
    pub fn respond(&self, group: FaultGroup, response: PageResponse) -> Result<()> {
        let code = match response {
            PageResponse::Success => sys::iommufd_page_response_code_IOMMUFD_PAGE_RESP_SUCCESS,
            PageResponse::Invalid => sys::iommufd_page_response_code_IOMMUFD_PAGE_RESP_INVALID,
        };
        let [cookie, code] = [group.cookie, code].map(u32::to_ne_bytes);
        let operation = Operation::RespondToFault;
        let bytes = [cookie, code].concat();
        match write(&self.file, &bytes).map_err(|errno| operation.failed(errno))? {
            written if written == bytes.len() => Ok(()),
            _ => Err(Error::Protocol { operation, why: "the kernel accepted only part of the response" }),
        }
    }
}

impl AsFd for FaultQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Parses `bytes`, which holds only whole faults. Faults of the same group are adjacent and have the same cookie.
fn groups(bytes: &[u8]) -> Vec<FaultGroup> {
    let mut groups: Vec<FaultGroup> = Vec::new();
    for bytes in bytes.chunks_exact(FAULT) {
        let word = |offset: usize| word(bytes, offset);
        let flags = word(offset_of!(sys::iommu_hwpt_pgfault, flags));
        let has_pasid = flags & sys::iommu_hwpt_pgfault_flags_IOMMU_PGFAULT_FLAGS_PASID_VALID != 0;
        let address = offset_of!(sys::iommu_hwpt_pgfault, addr);
        let fault = Fault {
            device: DeviceId(word(offset_of!(sys::iommu_hwpt_pgfault, dev_id))),
            pasid: has_pasid.then(|| word(offset_of!(sys::iommu_hwpt_pgfault, pasid))),
            group: word(offset_of!(sys::iommu_hwpt_pgfault, grpid)),
            permissions: FaultPermissions::from_bits_retain(word(offset_of!(sys::iommu_hwpt_pgfault, perm))),
            address: u64::from_ne_bytes(std::array::from_fn(|at| bytes[address + at])),
            len: word(offset_of!(sys::iommu_hwpt_pgfault, length)),
        };
        let cookie = word(offset_of!(sys::iommu_hwpt_pgfault, cookie));
        match groups.last_mut() {
            Some(group) if group.cookie == cookie => group.faults.push(fault),
            _ => groups.push(FaultGroup { cookie, faults: vec![fault] }),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{is_closed, mock_kernel, read, write};
    use crate::{HwptFlags, HwptOptions};
    use std::cell::RefCell;
    use std::io::{Read, Write};
    use std::os::fd::IntoRawFd;
    use std::os::unix::net::UnixStream;
    use std::rc::Rc;

    /// Returns a queue whose descriptor is a socket, the other end of the socket, and a log of the other ioctls.
    fn queue() -> (Arc<FaultQueue>, UnixStream, Rc<RefCell<Vec<String>>>) {
        let (ours, kernels) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let (mut ours, other_end) = (Some(ours), kernels.try_clone().unwrap());
        let log = Rc::<RefCell<Vec<String>>>::default();
        let seen = Rc::clone(&log);
        let iommufd = mock_kernel(move |name, bytes| {
            match name {
                "IOMMU_FAULT_QUEUE_ALLOC" => {
                    let out_fault_fd = ours.take().unwrap().into_raw_fd() as u32;
                    write(bytes, &sys::iommu_fault_alloc { out_fault_id: 8, out_fault_fd, ..read(bytes) });
                }
                "IOMMU_HWPT_ALLOC" => {
                    let alloc: sys::iommu_hwpt_alloc = read(bytes);
                    seen.borrow_mut().push(format!("{:#b} faults in {}", alloc.flags, alloc.fault_id));
                    write(bytes, &sys::iommu_hwpt_alloc { out_hwpt_id: 9, ..alloc });
                }
                _ => {
                    let state = if is_closed(&other_end) { "closed" } else { "open" };
                    seen.borrow_mut()
                        .push(format!("destroy {}, {state}", read::<sys::iommu_destroy>(bytes).id));
                }
            }
            Ok(())
        });
        (iommufd.fault_queue_alloc().unwrap(), kernels, log)
    }

    fn fault(cookie: u32, flags: u32, addr: u64) -> [u8; FAULT] {
        let (dev_id, pasid, grpid, perm, length) = (3, 0x1234, 7, 3, 4096);
        let words = [flags, dev_id, pasid, grpid, perm, 0, addr as u32, (addr >> 32) as u32, length, cookie];
        words.map(u32::to_le_bytes).concat().try_into().unwrap()
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn faults_are_read_by_groups_and_answered_by_their_cookie() {
        let (queue, mut kernel, _) = queue();
        assert_eq!(queue.read(), Ok(vec![]));
        for fault in [fault(1, 1, 0x1000), fault(1, 2, 0x2_0000_0000), fault(2, 3, 0x3000)] {
            kernel.write_all(&fault).unwrap();
        }
        let mut groups = queue.read().unwrap();
        let second = groups.pop().unwrap();
        let first = groups.pop().unwrap();
        assert!(groups.is_empty());
        let wanted = Fault {
            device: DeviceId(3),
            pasid: Some(0x1234),
            group: 7,
            permissions: FaultPermissions::READ | FaultPermissions::WRITE,
            address: 0x1000,
            len: 4096,
        };
        let second_of_first = Fault { pasid: None, address: 0x2_0000_0000, ..wanted };
        assert_eq!(first.faults, [wanted, second_of_first]);
        assert_eq!(second.faults, [Fault { address: 0x3000, ..wanted }]);
        queue.respond(second, PageResponse::Success).unwrap();
        queue.respond(first, PageResponse::Invalid).unwrap();
        let mut responses = [0; 16];
        kernel.read_exact(&mut responses).unwrap();
        assert_eq!(responses, *[2, 0, 1, 1_u32].map(u32::to_le_bytes).concat());
    }

    #[test]
    fn half_a_fault_is_an_error() {
        let (queue, mut kernel, _) = queue();
        kernel.write_all(&[0; FAULT - 1]).unwrap();
        assert!(matches!(queue.read(), Err(Error::Protocol { .. })));
    }

    /// The kernel destroys neither a queue that a table uses nor one whose descriptor is open.
    #[test]
    fn a_table_keeps_its_queue_and_the_descriptor_closes_first() {
        let (queue, _kernel, log) = queue();
        // SAFETY: the test answers the ioctls, so no kernel object is involved.
        let ioas = unsafe { queue.iommufd().ioas_from_id(1) };
        let options = HwptOptions::new(HwptFlags::PASID).faults(&queue);
        let hwpt = ioas.hwpt_alloc(DeviceId(3), &options).unwrap();
        drop(queue);
        drop(hwpt);
        assert_eq!(*log.borrow(), ["0b1100 faults in 8", "destroy 9, open", "destroy 8, closed"]);
    }
}
