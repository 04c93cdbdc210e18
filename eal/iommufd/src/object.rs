//! Kernel objects.

use crate::Iommufd;
use crate::sys;

/// A kernel object, identified by its id and destroyed on drop. It keeps its iommufd open until then.
#[derive(Debug)]
pub(crate) struct Object {
    id: u32,
    iommufd: Iommufd,
    /// Kind of object, for log messages.
    kind: &'static str,
    /// Whether the object is destroyed elsewhere.
    foreign: bool,
}

impl Object {
    pub(crate) fn new(iommufd: &Iommufd, id: u32, kind: &'static str) -> Self {
        Self { id, iommufd: iommufd.clone(), kind, foreign: false }
    }

    pub(crate) fn foreign(iommufd: &Iommufd, id: u32, kind: &'static str) -> Self {
        Self { id, iommufd: iommufd.clone(), kind, foreign: true }
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    pub(crate) fn iommufd(&self) -> &Iommufd {
        &self.iommufd
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        if self.foreign {
            return;
        }
        let mut destroy = sys::iommu_destroy { id: self.id, ..Default::default() };
        // SAFETY: the argument has no addresses. Nothing uses the kernel's object after this value is dropped.
        if let Err(errno) = unsafe { self.iommufd.call(&mut destroy) } {
            tracing::error!("cannot destroy {} {}: {errno}", self.kind, self.id);
        }
    }
}
