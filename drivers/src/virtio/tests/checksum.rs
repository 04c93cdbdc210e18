//! Tests of checksums that the device computes or verifies.

use super::*;
use crate::port::Offloads;

const CHECKSUMS: u64 = feature::CSUM | feature::GUEST_CSUM;
const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;

/// Starts a port with `offloads` on a device that supports both.
fn bench(offloads: Offloads, behaviour: Behaviour, config: PortConfig) -> Bench {
    let behaviour = Behaviour { features: behaviour.features | CHECKSUMS, ..behaviour };
    Bench::started(behaviour, Options::default(), BUFFERS, &config.with_offloads(offloads))
}

/// Returns a frame of `len` bytes with a partial checksum of 0x1234 at byte 50, over the bytes from 34 on.
fn partial_frame(len: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
    frame[50..52].copy_from_slice(&[0x12, 0x34]);
    frame
}

/// Whether the checksum over the bytes from 34 on is complete: together with the pseudo-header's sum, 0x1234,
/// they sum to 0xffff.
fn is_complete(frame: &[u8]) -> bool {
    let word = |word: &[u8]| u32::from(word[0]) << 8 | word.get(1).map_or(0, |low| u32::from(*low));
    let sum = frame[34..].chunks(2).map(word).fold(0x1234, |sum, word| {
        let sum = sum + word;
        (sum & 0xffff) + (sum >> 16)
    });
    sum == 0xffff
}

#[test]
fn only_who_asks_gets_what_the_device_has() {
    let start = |features: u64, offloads| {
        let nic = VirtioNet::new(Behaviour { features, ..Behaviour::default() });
        let (memory, mut cache) = memory(BUFFERS);
        nic.attach(memory.device_view().unwrap());
        let mut device = Device::probe(nic.function()).unwrap();
        let has = device.capabilities().offloads;
        let started = device.start_pair(&CONFIG.with_offloads(offloads), &memory, &mut cache);
        let agreed = nic.driver_features() & CHECKSUMS;
        let queues = started.map_err(|error| (error.kind(), error.to_string()))?;
        let sends = queues.1.offloads();
        device.stop_pair(queues.0, queues.1, &mut cache).unwrap();
        Ok::<_, (ErrorKind, String)>((has, agreed, sends))
    };
    let plain = Behaviour::default().features;
    let (none, rx, tx, both) =
        (Offloads::empty(), Offloads::RX_CHECKSUM, Offloads::TX_CHECKSUM, Offloads::all());
    assert_eq!(start(plain | CHECKSUMS, none), Ok((both, 0, none)));
    assert_eq!(start(plain | CHECKSUMS, rx), Ok((both, feature::GUEST_CSUM, none)));
    assert_eq!(start(plain | CHECKSUMS, tx), Ok((both, feature::CSUM, tx)));
    assert_eq!(start(plain | feature::CSUM, tx), Ok((tx, feature::CSUM, tx)));
    let (kind, why) = start(plain | feature::CSUM, both).unwrap_err();
    assert_eq!(kind, ErrorKind::Usage);
    assert!(why.contains("it has no rx-checksum"), "{why}");
    let (_, why) = start(plain, both).unwrap_err();
    assert!(why.contains("no rx-checksum and no tx-checksum"), "{why}");
}

#[test]
fn headers_say_what_is_known_of_a_checksum() {
    for bits in [0, feature::MRG_RXBUF] {
        let mut bench = bench(Offloads::RX_CHECKSUM, without(bits), CONFIG);
        for (checksum, good, partial) in [
            ((0, 34, 16), false, false),
            ((DATA_VALID, 9, 9), true, false),
            ((NEEDS_CSUM, 34, 16), false, true),
            ((NEEDS_CSUM | DATA_VALID, 34, 16), true, true),
            ((NEEDS_CSUM, 58, 0), false, true),
        ] {
            bench.nic.behave(|behaviour| behaviour.checksum = checksum);
            assert!(bench.nic.receive(&partial_frame(60)));
            let burst = bench.receive();
            let says = bench.cache.partial_checksum(&burst[0]).map(|partial| (partial.start, partial.offset));
            assert_eq!(says, partial.then_some((checksum.1, checksum.2)), "{checksum:?}");
            assert_eq!((burst[0].has_good_checksum(), burst[0].has_partial_checksum()), (good, partial));
            assert_eq!(bench.bytes(&burst[0]), partial_frame(60));
            bench.free(burst);
        }
        let stats = bench.rx.counters().read();
        assert_eq!((stats.packets, stats.checksum_good, stats.checksum_partial), (5, 2, 3));
        assert_eq!(bench.stop().0, BUFFERS);
    }
}

#[test]
fn a_place_beyond_the_frame_costs_the_frame_and_no_more() {
    for bits in [0, feature::MRG_RXBUF, feature::EVENT_IDX] {
        let mut bench = bench(Offloads::RX_CHECKSUM, without(bits), CONFIG);
        for (start, offset) in [(59, 0), (0, 59), (0xffff, 0xffff), (60, 0)] {
            for checksum in [(0, 0, 0), (NEEDS_CSUM, start, offset), (NEEDS_CSUM, 34, 16)] {
                bench.nic.behave(|behaviour| behaviour.checksum = checksum);
                assert!(bench.nic.receive(&frame(0)));
            }
            let burst = bench.receive();
            let partial: Vec<_> = burst.iter().map(Packet::has_partial_checksum).collect();
            assert_eq!(partial, [false, true], "{start}, {offset}");
            bench.free(burst);
        }
        let stats = bench.rx.counters().read();
        assert_eq!((stats.packets, stats.errors, stats.device_errors), (8, 4, 0));
        assert_eq!(bench.stop().0, BUFFERS);
    }
}

/// Packets that one port receives with a partial checksum leave another port with a complete one.
#[test]
fn the_device_makes_the_checksums_of_forwarded_packets() {
    let mut bench = bench(Offloads::all(), Behaviour::default(), CONFIG);
    for round in 0..200_u16 {
        let frames: Vec<_> = (0..7).map(|i| partial_frame(60 + usize::from(round) + i)).collect();
        for (i, frame) in frames.iter().enumerate() {
            let flags = if i % 2 == 0 { NEEDS_CSUM } else { DATA_VALID };
            bench.nic.behave(|behaviour| behaviour.checksum = (flags, 34, 16));
            assert!(bench.nic.receive(frame));
        }
        while bench.forward() > 0 {}
        let sent = bench.nic.transmitted();
        for (i, (sent, frame)) in sent.iter().zip(&frames).enumerate() {
            assert_eq!((sent.len(), is_complete(sent)), (frame.len(), i % 2 == 0), "{round}, {i}");
            assert_eq!((&sent[..50], &sent[52..]), (&frame[..50], &frame[52..]));
        }
        assert_eq!(sent.len(), 7);
    }
    let (rx, tx) = (bench.rx.counters().read(), bench.tx.counters().read());
    assert_eq!((rx.checksum_good, rx.checksum_partial, tx.checksum_offloaded), (600, 800, 800));
    assert_eq!(bench.stop().0, BUFFERS);
}

/// A buffer may contain a header, written by a device or by a port with checksum offloads, when another port
/// sends it.
#[test]
fn a_port_without_the_offload_asks_for_nothing() {
    for bits in [0, feature::MRG_RXBUF] {
        let mut bench = bench(Offloads::RX_CHECKSUM, without(bits), CONFIG);
        bench.nic.behave(|behaviour| behaviour.checksum = (NEEDS_CSUM, 34, 16));
        assert!(bench.nic.receive(&partial_frame(60)));
        assert_eq!(bench.forward(), 1);
        assert_eq!(bench.nic.transmitted(), [partial_frame(60)]);
        assert_eq!(bench.tx.counters().checksum_offloaded.get(), 0);
        assert_eq!(bench.stop().0, BUFFERS);
    }
}

#[test]
fn long_frames_have_the_offloads_too() {
    let behaviour = Behaviour {
        features: Behaviour::default().features | feature::INDIRECT_DESC,
        ..Behaviour::default()
    };
    let mut bench = bench(Offloads::all(), behaviour, CONFIG.with_max_frame(9000));
    // The bytes in front of a frame's later segments are not a header.
    let mut packets: Vec<_> = (0..300).filter_map(|_| bench.cache.allocate()).collect();
    for packet in &mut packets {
        packet.prepend(60).unwrap();
        bench.cache.write(packet, 0, &[NEEDS_CSUM | DATA_VALID; 60]);
    }
    packets.into_iter().for_each(|packet| bench.cache.free(packet));
    let lens = [60, 1908, 1909, 4000, 9000];
    for len in lens.repeat(20) {
        bench.nic.behave(|behaviour| behaviour.checksum = (NEEDS_CSUM, 34, 16));
        assert!(bench.nic.receive(&partial_frame(len)));
        bench.nic.behave(|behaviour| behaviour.checksum = (NEEDS_CSUM, 8990, 16));
        assert!(bench.nic.receive(&partial_frame(len)));
        let mut burst = bench.receive();
        let said = burst.iter().filter(|packet| packet.has_partial_checksum() || packet.has_good_checksum());
        assert_eq!((said.count(), burst[0].has_partial_checksum()), (1, true));
        bench.tx.tx_burst(&mut bench.cache, &mut burst);
        assert!(burst.is_empty());
        let sent = bench.nic.transmitted();
        assert_eq!((sent.len(), sent[0].len(), is_complete(&sent[0])), (1, len, true));
    }
    let (rx, tx) = (bench.rx.counters().read(), bench.tx.counters().read());
    assert_eq!((rx.packets, rx.errors, rx.checksum_partial, tx.checksum_offloaded), (100, 100, 100, 100));
    assert_eq!(bench.stop().0, BUFFERS);
}
