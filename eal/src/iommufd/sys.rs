//! ioctls of `/dev/iommu` (`include/uapi/linux/iommufd.h`).

use iommufd_bindings::{
    iommu_destroy, iommu_ioas_alloc, iommu_ioas_allow_iovas, iommu_ioas_copy, iommu_ioas_iova_ranges,
    iommu_ioas_map, iommu_ioas_map_file, iommu_ioas_unmap, iommu_option,
};
use nix::{ioctl_readwrite_bad, request_code_none};

const TYPE: u8 = b';';

ioctl_readwrite_bad!(destroy, request_code_none!(TYPE, 0x80), iommu_destroy);
ioctl_readwrite_bad!(ioas_alloc, request_code_none!(TYPE, 0x81), iommu_ioas_alloc);
ioctl_readwrite_bad!(ioas_allow_iovas, request_code_none!(TYPE, 0x82), iommu_ioas_allow_iovas);
ioctl_readwrite_bad!(ioas_copy, request_code_none!(TYPE, 0x83), iommu_ioas_copy);
ioctl_readwrite_bad!(ioas_iova_ranges, request_code_none!(TYPE, 0x84), iommu_ioas_iova_ranges);
ioctl_readwrite_bad!(ioas_map, request_code_none!(TYPE, 0x85), iommu_ioas_map);
ioctl_readwrite_bad!(ioas_unmap, request_code_none!(TYPE, 0x86), iommu_ioas_unmap);
ioctl_readwrite_bad!(option, request_code_none!(TYPE, 0x87), iommu_option);
ioctl_readwrite_bad!(ioas_map_file, request_code_none!(TYPE, 0x8f), iommu_ioas_map_file);
ioctl_readwrite_bad!(ioas_noiommu_get_pa, request_code_none!(TYPE, 0x95), iommu_ioas_noiommu_get_pa);

/// `struct iommu_ioas_noiommu_get_pa` (kernel 7.3), which `iommufd-bindings` does not have yet.
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct iommu_ioas_noiommu_get_pa {
    pub(super) size: u32,
    pub(super) flags: u32,
    pub(super) ioas_id: u32,
    pub(super) reserved: u32,
    pub(super) iova: u64,
    pub(super) length: u64,
    pub(super) out_phys: u64,
}

const _: () = assert!(size_of::<iommu_ioas_noiommu_get_pa>() == 40);
