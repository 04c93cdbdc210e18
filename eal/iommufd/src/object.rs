//! An object of the kernel.

use crate::Iommufd;
use crate::sys;

/// An object by its id. Destroyed on drop, and its descriptor stays open until then.
#[derive(Debug)]
pub(crate) struct Object {
    id: u32,
    iommufd: Iommufd,
    /// What it is, for the log.
    kind: &'static str,
    /// Whether somebody else destroys it.
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
        // SAFETY: the argument has no addresses. What the kernel's object stands for has been given up with this value.
        if let Err(errno) = unsafe { self.iommufd.call(&mut destroy) } {
            tracing::error!("cannot destroy {} {}: {errno}", self.kind, self.id);
        }
    }
}
