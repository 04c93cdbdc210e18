//! ioctls of VFIO (`include/uapi/linux/vfio.h`).

use nix::libc::c_char;
use nix::{ioctl_none_bad, ioctl_readwrite_bad, ioctl_write_int_bad, ioctl_write_ptr_bad, request_code_none};
use vfio_bindings::bindings::vfio as uapi;

const TYPE: u8 = b';';

ioctl_none_bad!(get_api_version, request_code_none!(TYPE, 0x64));
ioctl_write_int_bad!(check_extension, request_code_none!(TYPE, 0x65));
ioctl_write_int_bad!(set_iommu, request_code_none!(TYPE, 0x66));
ioctl_readwrite_bad!(group_get_status, request_code_none!(TYPE, 0x67), uapi::vfio_group_status);
ioctl_write_ptr_bad!(group_set_container, request_code_none!(TYPE, 0x68), i32);
ioctl_write_ptr_bad!(group_get_device_fd, request_code_none!(TYPE, 0x6a), c_char);
ioctl_readwrite_bad!(device_get_info, request_code_none!(TYPE, 0x6b), uapi::vfio_device_info);
ioctl_readwrite_bad!(device_get_region_info, request_code_none!(TYPE, 0x6c), uapi::vfio_region_info);
ioctl_readwrite_bad!(device_get_irq_info, request_code_none!(TYPE, 0x6d), uapi::vfio_irq_info);
ioctl_write_ptr_bad!(device_set_irqs, request_code_none!(TYPE, 0x6e), uapi::vfio_irq_set);
ioctl_none_bad!(device_reset, request_code_none!(TYPE, 0x6f));
ioctl_readwrite_bad!(iommu_get_info, request_code_none!(TYPE, 0x70), uapi::vfio_iommu_type1_info);
ioctl_write_ptr_bad!(iommu_map_dma, request_code_none!(TYPE, 0x71), uapi::vfio_iommu_type1_dma_map);
ioctl_readwrite_bad!(iommu_unmap_dma, request_code_none!(TYPE, 0x72), uapi::vfio_iommu_type1_dma_unmap);
ioctl_readwrite_bad!(bind_iommufd, request_code_none!(TYPE, 0x76), uapi::vfio_device_bind_iommufd);
ioctl_readwrite_bad!(attach_iommufd_pt, request_code_none!(TYPE, 0x77), uapi::vfio_device_attach_iommufd_pt);
