//! Properties of the IOMMU behind a device.

use bitflags::bitflags;

use crate::error::{Operation, Result};
use crate::{DeviceId, Iommufd, open_enum, sys};

bitflags! {
    /// Capabilities that exist for all IOMMU types (`enum iommufd_hw_capabilities`). Later kernels have more bits.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct HwCapabilities: u64 {
        /// The IOMMU tracks the pages that devices write.
        const DIRTY_TRACKING = sys::iommufd_hw_capabilities_IOMMU_HW_CAP_DIRTY_TRACKING as u64;
        /// The device's PASIDs support execute permission.
        const PASID_EXEC = sys::iommufd_hw_capabilities_IOMMU_HW_CAP_PCI_PASID_EXEC as u64;
        /// The device's PASIDs support privileged mode.
        const PASID_PRIV = sys::iommufd_hw_capabilities_IOMMU_HW_CAP_PCI_PASID_PRIV as u64;
        /// The device does not support ATS or cannot use it.
        const NO_ATS = sys::iommufd_hw_capabilities_IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED as u64;
        const _ = !0;
    }
}

open_enum! {
    /// Type of the structure with an IOMMU's properties (`enum iommu_hw_info_type`).
    HwInfoType {
        /// The IOMMU's driver reports no properties.
        NONE = iommu_hw_info_type_IOMMU_HW_INFO_TYPE_NONE,
        /// `struct iommu_hw_info_vtd`.
        INTEL_VTD = iommu_hw_info_type_IOMMU_HW_INFO_TYPE_INTEL_VTD,
        /// `struct iommu_hw_info_arm_smmuv3`.
        ARM_SMMUV3 = iommu_hw_info_type_IOMMU_HW_INFO_TYPE_ARM_SMMUV3,
        /// `struct iommu_hw_info_tegra241_cmdqv`.
        TEGRA241_CMDQV = iommu_hw_info_type_IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV,
        /// `struct iommu_hw_info_amd`.
        AMD = iommu_hw_info_type_IOMMU_HW_INFO_TYPE_AMD,
    }
}

/// Properties of the IOMMU behind a device.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HwInfo {
    /// Type of the structure in [`data`](Self::data).
    pub kind: HwInfoType,
    /// Bytes of the structure. The kernel determines their number.
    pub data: Vec<u8>,
    /// Capabilities that do not depend on the type of the IOMMU.
    pub capabilities: HwCapabilities,
    /// Width of the device's PASIDs in bits; 0 if the device has no PASIDs.
    pub pasid_bits: u8,
}

impl HwInfo {
    pub(crate) fn read(iommufd: &Iommufd, device: DeviceId, wanted: Option<HwInfoType>) -> Result<Self> {
        let mut data = vec![0; 64];
        loop {
            let mut info = sys::iommu_hw_info {
                flags: wanted.map_or(0, |_| sys::iommufd_hw_info_flags_IOMMU_HW_INFO_FLAG_INPUT_TYPE),
                dev_id: device.0,
                data_len: data.len() as u32,
                data_uptr: data.as_mut_ptr() as u64,
                ..Default::default()
            };
            info.__bindgen_anon_1.in_data_type = wanted.map_or(0, |wanted| wanted.0);
            // SAFETY: the kernel writes at most `data_len` bytes, which is the length of the vector at that address.
            unsafe { iommufd.call(&mut info) }.map_err(|errno| Operation::HwInfo.failed(errno))?;
            let len = info.data_len as usize;
            if len > data.len() {
                data.resize(len, 0);
                continue;
            }
            data.truncate(len);
            return Ok(Self {
                // SAFETY: both fields of the union are a `u32`.
                kind: HwInfoType(unsafe { info.__bindgen_anon_1.out_data_type }),
                data,
                capabilities: HwCapabilities::from_bits_retain(info.out_capabilities),
                pasid_bits: info.out_max_pasid_log2,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{mock_kernel, read, write};

    #[test]
    fn properties_are_read_however_long_they_are() {
        let iommufd = mock_kernel(|name, bytes| {
            assert_eq!(name, "IOMMU_GET_HW_INFO");
            let mut info: sys::iommu_hw_info = read(bytes);
            // SAFETY: both fields of the union are a `u32`.
            let wanted = unsafe { info.__bindgen_anon_1.in_data_type };
            assert_eq!((info.size, info.flags, info.dev_id, wanted), (40, 1, 4, 2));
            let room = info.data_len.min(100) as usize;
            // SAFETY: the argument states that `data_len` bytes may be written at that address.
            unsafe { std::slice::from_raw_parts_mut(info.data_uptr as *mut u8, room) }.fill(7);
            (info.data_len, info.out_max_pasid_log2, info.out_capabilities) = (100, 20, 1 | 1 << 40);
            write(bytes, &info);
            Ok(())
        });
        let info = iommufd.hw_info(DeviceId(4), Some(HwInfoType::ARM_SMMUV3)).unwrap();
        assert_eq!((info.kind, info.data, info.pasid_bits), (HwInfoType::ARM_SMMUV3, vec![7; 100], 20));
        assert!(info.capabilities.contains(HwCapabilities::DIRTY_TRACKING));
        assert_eq!(info.capabilities.bits(), 1 | 1 << 40);
    }
}
