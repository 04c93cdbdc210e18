//! Tests of igb only, against the in-process device.

use super::*;
use crate::fakedev;
use crate::fakedev::igb::{Faults, ID_82576, ID_I350};
use crate::intel::tests::*;
use crate::port::{Link, Nic};

impl Family for Igb {
    type Model = fakedev::igb::Igb;

    const STANDARD: DeviceId = ID_82576;
    const CHIPS: &'static [DeviceId] = &[ID_82576, ID_I350];
    const KINDS: &'static [DeviceId] = Self::CHIPS;
    /// Device address above 32 bits.
    const IOVA: u64 = 0x12_8000_0000;
}

type Rig = crate::intel::tests::Rig<Igb>;

tests_of_every_chip!(Igb);

#[test]
fn short_frames_are_padded_where_the_chip_does_not_do_it() {
    in_both_modes(|| {
        // QEMU's model does not pad at all, and the chip pads only frames of 17 bytes or more.
        for (pads, len, padded) in
            [(false, 17, if SILICON.get() { 60 } else { 17 }), (false, 16, 16), (true, 1, 60), (true, 17, 60)]
        {
            let mut rig = Rig::standard();
            if pads {
                rig.port.pad_short_frames();
                rig.restart();
            }
            for number in 0..100 {
                let mut wanted = vec![number; len];
                wanted.resize(padded, 0);
                assert_eq!(rig.send_in_used_buffer(&vec![number; len]), [wanted], "{pads} {len}");
            }
            rig.stop();
        }
    });
}

#[test]
fn long_frames_have_their_limit_in_the_chip() {
    in_both_modes(|| {
        let rig = Rig::new(ID_82576, CONFIG.with_max_frame(9000), 512);
        let of = |register| rig.device.register(register);
        assert_eq!((of(SRRCTL), of(RLPML)), (0x0200_0001, 9004));
        assert_eq!(of(FCRTH), 0xDCD0, "64 KiB less a frame");
        rig.stop();
    });
}

#[test]
fn start_brings_up_what_the_manual_asks_for() {
    in_both_modes(|| {
        let rig = Rig::standard();
        let of = |register| rig.device.register(register);
        assert_eq!(of(RCTL), RCTL_EN | RCTL_BAM | RCTL_DPF | RCTL_SECRC);
        assert_eq!(of(TCTL), 0xA400_00FA, "EN and PSP, and the rest as it was");
        assert_eq!((of(RDLEN), of(TDLEN), of(RDT), of(TDT)), (1024, 1024, 63, 0));
        assert_eq!(of(SRRCTL), 0x0200_0002, "advanced, one buffer of 2 KiB, no Drop_En");
        assert_eq!((of(RXDCTL), of(TXDCTL)), (0x0200_0108, 0x0200_0108));
        assert_eq!((of(MRQC), of(VT_CTL), of(RXCSUM)), (0, 0, 0));
        assert_eq!(of(CTRL) & (CTRL_SLU | CTRL_FRCSPD | CTRL_FRCDPX | CTRL_GIO_MASTER_DISABLE), CTRL_SLU);
        assert_eq!(of(CTRL_EXT) & CTRL_EXT_DRV_LOAD, CTRL_EXT_DRV_LOAD);
        assert_eq!((of(FCRTH), of(FCRTL)), (0xE660, 0xE650 | FCRTL_XONE));
        assert!(rig.device.config().bus_master());
        assert_eq!(rig.port.mac(), MAC);
        assert_eq!(rig.port.link(), Link { up: true, speed: Some(1000), full_duplex: true, autoneg: true });
        rig.stop();
    });
}

#[test]
fn the_chips_get_what_is_theirs() {
    in_both_modes(|| {
        // Initially GCR resends requests and has no timeout, and PHPM disconnects the link.
        for (id, gcr, control2, phpm) in [(ID_82576, 1 << 18, 5, 1 << 5), (ID_I350, 5 << 16, 0, 0)] {
            let rig = Rig::new(id, CONFIG, 512);
            let mut word = [0; 2];
            rig.device.config().read(0x40 + 0x28, &mut word);
            let got = (rig.device.register(GCR), u16::from_le_bytes(word), rig.device.register(PHPM));
            assert_eq!(got, (gcr, control2, phpm), "{id}");
            rig.stop();
        }
        // A chip with version 1 of the capability has its timeout in GCR.
        let mut rig = Rig::standard();
        rig.pause();
        rig.device.set_register(GCR, 1 << 16);
        rig.resume();
        assert_eq!(rig.device.register(GCR), 1 << 12);
        rig.stop();
    });
}

#[test]
fn a_queue_that_does_not_start_gives_its_buffers_back() {
    in_both_modes(|| {
        let mut rig = Rig::standard();
        rig.pause();
        rig.device.set_faults(Faults { never_enabled: true, ..Faults::default() });
        let error = rig.refusal().to_string();
        assert!(error.contains("register 0xc028 was still"), "{error}");
        assert!(!rig.device.config().bus_master());
        rig.device.set_faults(Faults::default());
        rig.resume();
        rig.stop();
    });
}

/// A holder of the semaphore or of the PHY is a killed process, because no other process uses this port.
#[test]
fn what_a_killed_process_held_is_taken_back() {
    const PORT_1: u32 = SW_FW_SYNC_PHY[1];
    in_both_modes(|| {
        for (swsm, sync) in [(SWSM_SMBI, 0), (SWSM_SMBI | SWSM_SWESMBI, PORT_1), (0, PORT_1 | 1 << 1)] {
            let (function, device) = fake::<Igb>(ID_82576, MAC);
            let (memory, pool) = memory::<Igb>(128);
            device.sleep_phy();
            let mut port = Device::probe(function).unwrap();
            device.set_register(SWSM, swsm);
            device.set_register(SW_FW_SYNC, sync);
            // A probe does this if the function's reset left the registers unchanged.
            port.chip.release_phy(&port.hardware);
            let mut cache = pool.cache();
            let (rx, tx) = port.start_pair(&CONFIG, &memory, &mut cache).unwrap();
            assert!(port.link().up, "{swsm:#x} {sync:#x}");
            // Another port keeps its PHY.
            assert_eq!(device.register(SW_FW_SYNC), sync & !PORT_1);
            assert_eq!(device.register(SWSM) & (SWSM_SMBI | SWSM_SWESMBI), 0);
            port.stop_pair(rx, tx, &mut cache).unwrap();
        }
    });
}

#[test]
fn firmware_that_keeps_the_phy_leaves_the_port_without_flow_control() {
    in_both_modes(|| {
        let mut rig = Rig::standard();
        rig.device.plug(false, 0);
        rig.port.check().unwrap();
        rig.device.set_register(SW_FW_SYNC, SW_FW_SYNC_PHY[1] << SW_FW_SYNC_FIRMWARE_SHIFT);
        rig.device.plug(true, PHY_PAUSE);
        rig.port.check().unwrap();
        assert_eq!(rig.device.register(CTRL) & (CTRL_RFCE | CTRL_TFCE), 0);
        rig.stop();
    });
}

#[test]
fn what_else_the_chip_says_of_a_frame_is_no_error() {
    in_both_modes(|| {
        let mut rig = Rig::standard();
        // Wrong IP and TCP checksums, every status bit except DD and EOP, and a VLAN tag.
        rig.device.receive_raw(done::<Igb>(60) | 0x60 << 24 | 0xF_FFFC | 0xABCD << 48);
        assert_eq!(rig.poll().len(), 1);
        assert_eq!(rig.rx_stats().bytes, 60);
        rig.stop();
    });
}
