//! Feature bits and device status.

use super::Options;
use crate::port::{Offloads, PortConfig};

bitflags::bitflags! {
    /// Features that device and driver agree on (virtio 1.2, 5.1.3 and 6); only the bits that this driver
    /// knows.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Features: u64 {
        /// `VIRTIO_NET_F_CSUM`: the device computes the checksum of each sent packet that has a partial one.
        const CSUM = 1 << 0;
        /// `VIRTIO_NET_F_GUEST_CSUM`: the driver accepts packets with partial checksums, and the device
        /// reports which checksums it verified as good.
        const GUEST_CSUM = 1 << 1;
        /// `VIRTIO_NET_F_MTU`: config space holds the maximum frame length, without the Ethernet header.
        const MTU = 1 << 3;
        /// `VIRTIO_NET_F_MAC`: config space holds the station address.
        const MAC = 1 << 5;
        /// `VIRTIO_NET_F_MRG_RXBUF`: a frame may fill several RX buffers; the header counts them.
        const MRG_RXBUF = 1 << 15;
        /// `VIRTIO_NET_F_STATUS`: config space reports whether the link is up.
        const STATUS = 1 << 16;
        /// `VIRTIO_NET_F_CTRL_VQ`: there is a control virtqueue.
        const CTRL_VQ = 1 << 17;
        /// `VIRTIO_NET_F_CTRL_RX`: the control virtqueue sets the RX filter; needs `CTRL_VQ`.
        const CTRL_RX = 1 << 18;
        /// `VIRTIO_NET_F_MQ`: there are several queue pairs; config space holds their number.
        const MQ = 1 << 22;
        /// `VIRTIO_F_INDIRECT_DESC`: a descriptor may refer to a table of descriptors.
        const INDIRECT_DESC = 1 << 28;
        /// `VIRTIO_F_EVENT_IDX`: each side publishes the index at which it wants to be notified.
        const EVENT_IDX = 1 << 29;
        /// `VIRTIO_F_VERSION_1`: the interface of virtio 1.0 and later.
        const VERSION_1 = 1 << 32;
        /// `VIRTIO_F_ACCESS_PLATFORM`: the device's memory accesses go through the IOMMU.
        const ACCESS_PLATFORM = 1 << 33;
        /// `VIRTIO_F_IN_ORDER`: the device uses buffers in the order in which they were offered.
        const IN_ORDER = 1 << 35;
        /// `VIRTIO_F_ORDER_PLATFORM`: the device needs barriers for devices, not only for CPUs (virtio 1.2,
        /// 6). The barriers of `vireo_eal::dma` are for devices on every architecture, so the driver always
        /// accepts this bit. Without the bit, the device is software on another CPU, for which these barriers
        /// also suffice.
        const ORDER_PLATFORM = 1 << 36;
        /// `VIRTIO_F_RING_RESET`: the driver can reset a single queue.
        const RING_RESET = 1 << 40;
    }

    /// `device_status` (virtio 1.2, 2.1).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Status: u8 {
        /// The driver has noticed the device.
        const ACKNOWLEDGE = 1 << 0;
        /// The driver supports the device.
        const DRIVER = 1 << 1;
        /// The driver is ready; queues are live.
        const DRIVER_OK = 1 << 2;
        /// Both sides agree on the features.
        const FEATURES_OK = 1 << 3;
        /// The device encountered an error from which only a reset recovers.
        const DEVICE_NEEDS_RESET = 1 << 6;
        /// The driver has given up.
        const FAILED = 1 << 7;
    }
}

impl Features {
    /// The feature that provides each offload.
    const OFFLOADS: &[(Self, Offloads)] =
        &[(Self::CSUM, Offloads::TX_CHECKSUM), (Self::GUEST_CSUM, Offloads::RX_CHECKSUM)];

    /// Returns the offloads that these features provide.
    pub(super) fn offloads(self) -> Offloads {
        let given = Self::OFFLOADS.iter().filter(|(feature, _)| self.contains(*feature));
        given.map(|(_, offload)| *offload).collect()
    }

    /// Features that frames of several buffers need: mergeable buffers for RX, and indirect tables for TX.
    pub(super) const LONG: Self = Self::MRG_RXBUF.union(Self::INDIRECT_DESC);

    /// Selects from these offered features those that the driver uses for a port of `config`, as far as
    /// `options` permit. Several queue pairs, the features for long frames and offloads are used only if
    /// `config` requests them.
    pub(super) fn wanted(self, options: Options, config: &PortConfig) -> Self {
        let mut wanted = self;
        wanted.set(Self::IN_ORDER, options.in_order && self.contains(Self::IN_ORDER));
        wanted.set(Self::MRG_RXBUF, options.mrg_rxbuf && self.contains(Self::MRG_RXBUF));
        let long = config.is_scattered() && wanted.contains(Self::LONG);
        wanted.set(Self::INDIRECT_DESC, long);
        // A driver that accepts MTU must not send longer frames (5.1.4.2). A port for short frames does not
        // check lengths, so it does not accept MTU.
        wanted.set(Self::MTU, long && self.contains(Self::MTU));
        let several = config.rx_queues.max(config.tx_queues) > 1;
        wanted.set(Self::MQ, several && self.contains(Self::MQ));
        for (feature, offload) in Self::OFFLOADS {
            wanted.set(*feature, config.offloads.contains(*offload) && self.contains(*feature));
        }
        wanted.set(Self::CTRL_RX, self.contains(Self::CTRL_VQ | Self::CTRL_RX));
        wanted
    }
}
