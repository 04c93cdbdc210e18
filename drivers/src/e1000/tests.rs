//! Tests of e1000 only, against the in-process device.

use vireo_eal::dma::{Burst, DmaMemory, Pool};
use vireo_eal::mem::{Backing, Region};

use super::*;
use crate::fakedev;
use crate::fakedev::e1000::{ID_82540EM, ID_82544GC, ID_82545EM, ID_82545GM, ID_82574L};
use crate::intel::tests::*;
use crate::port::{Link, Nic, PortConfig, RxBurst};

impl Family for E1000 {
    type Model = fakedev::e1000::E1000;

    const STANDARD: DeviceId = ID_82574L;
    const CHIPS: &'static [DeviceId] = &[ID_82540EM, ID_82574L];
    const KINDS: &'static [DeviceId] = &[ID_82544GC, ID_82540EM, ID_82545EM, ID_82545GM, ID_82574L];
    /// Device address within 32 bits.
    const IOVA: u64 = 0x8000_0000;
}

type Rig = crate::intel::tests::Rig<E1000>;

tests_of_every_chip!(E1000);

#[test]
fn short_frames_are_padded_where_the_chip_does_not_do_it_well() {
    in_both_modes(|| {
        // QEMU's 82574L does not pad.
        for (id, padded) in [(ID_82540EM, 60), (ID_82574L, if SILICON.get() { 60 } else { 17 })] {
            let mut rig = Rig::new(id, CONFIG, 512);
            for number in 0..200 {
                let mut wanted = vec![number; 17];
                wanted.resize(padded, 0);
                assert_eq!(rig.send_in_used_buffer(&[number; 17]), [wanted]);
            }
            rig.stop();
        }
    });
}

#[test]
fn wrong_checksums_of_the_payload_are_no_errors_of_the_frame() {
    in_both_modes(|| {
        let mut rig = Rig::standard();
        rig.device.receive_raw(done::<E1000>(60) | 0x60 << 40);
        assert_eq!(rig.poll().len(), 1);
        rig.stop();
    });
}

#[test]
fn start_brings_up_what_the_manual_asks_for() {
    in_both_modes(|| {
        let rig = Rig::standard();
        let of = |register| rig.device.register(register);
        assert_eq!(of(RCTL), RCTL_EN | RCTL_BAM | RCTL_DPF | RCTL_SECRC);
        assert_eq!(of(TCTL), 0x1004_00FA, "EN, PSP, CT, COLD, MULR");
        assert_eq!((of(RDLEN), of(TDLEN), of(RDT), of(TDT)), (1024, 1024, 63, 0));
        assert_ne!(of(CTRL) & CTRL_SLU, 0);
        assert!(rig.device.config().bus_master());
        assert_eq!(rig.port.mac(), MAC);
        assert_eq!(rig.port.link(), Link { up: true, speed: Some(1000), full_duplex: true, autoneg: true });
        rig.stop();
    });
}

/// The transmit FIFO has room for two frames and the receive FIFO for one, once the chip was reset with those
/// sizes.
#[test]
fn the_packet_buffer_is_divided_for_long_frames() {
    let cases = [
        (ID_82540EM, 1514, 0x0010_0030, 1),
        (ID_82540EM, 4000, 0x0010_0030, 1),
        (ID_82540EM, 9724, 0x0018_0028, 2),
        (ID_82574L, 9230, 0x0014_0014, 1),
    ];
    in_both_modes(|| {
        for (id, max_frame, pba, resets) in cases {
            let rig = Rig::new(id, CONFIG.with_max_frame(max_frame), 512);
            assert_eq!((rig.device.register(PBA), rig.device.resets()), (pba, resets), "{id} {max_frame}");
            let bytes = (pba & 0xFFFF) * 1024;
            assert!(rig.device.register(FCRTH) + max_frame as u32 + 4 <= bytes, "{id} {max_frame}");
            rig.stop();
        }
    });
}

#[test]
fn settings_survive_the_reload_behind_a_reset() {
    in_both_modes(|| {
        for id in E1000::KINDS.iter().copied() {
            let rig = Rig::new(id, CONFIG, 512);
            let ctrl = rig.device.register(CTRL);
            assert_eq!(ctrl & (CTRL_SLU | CTRL_FRCSPD | CTRL_FRCDPX), CTRL_SLU, "{id}: {ctrl:#x}");
            assert_eq!(rig.device.register(MANC) & MANC_ARP_EN, 0, "{id}");
            rig.stop();
        }
    });
}

#[test]
fn the_82574_gets_what_its_errata_want() {
    in_both_modes(|| {
        let rig = Rig::standard();
        let of = |register| rig.device.register(register);
        assert_eq!((of(GCR) >> 22 & 1, of(GCR2) & 1), (1, 1));
        assert_eq!((of(CTRL_EXT) >> 22 & 3, of(CTRL) >> 29 & 1), (1, 0));
        assert_eq!((of(TARC0) >> 26 & 1, of(TARC0) >> 27 & 0xF), (1, 0));
        let mut link_control = [0xff; 2];
        rig.device.config().read(0x50, &mut link_control);
        assert_eq!(link_control[0] & 3, 0, "ASPM");
        rig.stop();
    });
}

#[test]
fn rings_of_every_size_are_within_64_kib() {
    in_both_modes(|| {
        for id in [ID_82545EM, ID_82544GC] {
            for entries in [64, 1024, 4096] {
                let config = PortConfig::with_descriptors(entries, entries);
                let (function, device) = fake::<E1000>(id, MAC);
                let region = Region::new(16 << 20, Backing::SmallPages).unwrap();
                let memory = DmaMemory::with_addresses(region, 16 << 20, &[E1000::IOVA]);
                device.attach(memory.device_view().unwrap());
                let pool = Pool::new(&memory, 4500).unwrap();
                let mut cache = pool.cache();
                let mut port = Device::probe(function).unwrap();
                let (mut rx, tx) = port.start_pair(&config, &memory, &mut cache).unwrap();
                for (low, len) in [(RDBAL, RDLEN), (TDBAL, TDLEN)] {
                    let (base, len) = (device.register(low), device.register(len));
                    assert_eq!((base ^ (base + len - 1)) >> 16, 0, "{base:#x}, {len:#x}");
                }
                assert!(device.receive(&frame(1)));
                let mut burst = Burst::new();
                rx.rx_burst(&mut cache, &mut burst);
                assert_eq!(burst.len(), 1);
                burst.drain(..).for_each(|packet| cache.free(packet));
                port.stop_pair(rx, tx, &mut cache).unwrap();
            }
        }
    });
}

#[test]
fn chips_on_conventional_pci_state_32_address_bits() {
    SILICON.set(true);
    for (id, pcix, mask) in [
        (ID_82540EM, false, u32::MAX.into()),
        (ID_82545GM, false, u32::MAX.into()),
        (ID_82545GM, true, u64::MAX),
        (ID_82574L, false, u64::MAX),
    ] {
        let (function, device) = fake::<E1000>(id, MAC);
        if pcix {
            device.set_pcix();
        }
        assert_eq!(Device::probe(function).unwrap().capabilities().dma_mask, mask, "{id}");
    }
    let (function, device) = fake::<E1000>(ID_82544GC, MAC);
    device.set_pcix();
    assert!(Device::probe(function).unwrap_err().to_string().contains("PCI-X slot"));
}
