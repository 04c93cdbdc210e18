//! Tests of devices that lack a feature, break the rules of start-up, or misbehave in their rings.

use std::sync::Arc;

use vireo_eal::ErrorKind;
use vireo_eal::dma::DATA_ROOM;

use super::super::Device;
use super::{BUFFERS, Bench, CONFIG, frame, in_order, memory, without};
use crate::fakedev::virtio::{Behaviour, RX, TX, VirtioNet, feature};
use crate::port::{Nic, PortConfig, RxBurst, TxBurst};

/// Makes the device misbehave in an RX queue that worked before, and checks the consequences.
fn rx_lie(what: &str, violation: impl Fn(&VirtioNet)) {
    rx_lie_of(Behaviour::default(), what, &violation);
    rx_lie_of(Behaviour { one_element: false, ..in_order() }, what, &violation);
}

fn rx_lie_of(honest: Behaviour, what: &str, violation: &impl Fn(&VirtioNet)) {
    let mut bench = Bench::new(honest.clone());
    for number in 0..40 {
        assert!(bench.nic.receive(&frame(number)));
        let burst = bench.receive();
        assert_eq!(burst.len(), 1);
        bench.free(burst);
    }
    violation(&bench.nic);
    for _ in 0..3 {
        let burst = bench.receive();
        bench.free(burst);
    }
    let stats = bench.rx.counters().read();
    assert_eq!((stats.device_errors, bench.rx.is_broken()), (1, true), "{what}");
    bench.nic.receive(&frame(0));
    assert!(bench.receive().is_empty(), "{what}");
    // The other direction continues, and a restart repairs the queue without losing a buffer.
    assert_eq!(bench.send([frame(3)]), 1);
    assert_eq!(bench.nic.transmitted(), [frame(3)]);
    bench.nic.behave(|behaviour| *behaviour = honest.clone());
    let Bench { nic, mut device, rx, tx, mut cache, memory } = bench;
    device.stop_pair(rx, tx, &mut cache).unwrap();
    let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
    let mut bench = Bench { nic, device, rx, tx, cache, memory };
    assert!(bench.nic.receive(&frame(9)));
    assert_eq!((bench.forward(), bench.nic.transmitted()), (1, vec![frame(9)]), "{what}");
    assert_eq!(bench.stop().0, BUFFERS, "{what}");
}

#[test]
fn every_lie_about_received_frames_is_counted_and_stops_the_queue() {
    // 40 frames were received, so descriptor 40 of 64 is next.
    rx_lie("id far beyond the ring", |nic| nic.push_used(RX, 40_000, 72));
    rx_lie("id one beyond the ring", |nic| nic.push_used(RX, 64, 72));
    rx_lie("id beyond 16 bits", |nic| nic.push_used(RX, 0x1_0000 + 40, 72));
    rx_lie("length beyond the buffer", |nic| nic.push_used(RX, 40, 70_000));
    rx_lie("length of one byte too many", |nic| nic.push_used(RX, 40, (12 + DATA_ROOM + 1) as u32));
    rx_lie("length -1", |nic| nic.push_used(RX, 40, u32::MAX));
    rx_lie("length below the header", |nic| nic.push_used(RX, 40, 5));
    rx_lie("length 0", |nic| nic.push_used(RX, 40, 0));
    rx_lie("index ahead", |nic| nic.jump_used(RX, 1000));
    rx_lie("index behind", |nic| nic.jump_used(RX, 65_000));
    rx_lie("index one behind", |nic| nic.jump_used(RX, u16::MAX));
    rx_lie("id twice", |nic| {
        nic.behave(|behaviour| behaviour.num_buffers = None);
        nic.receive(&frame(1));
        nic.push_used(RX, 40, 72);
    });
    rx_lie("num_buffers 0", |nic| {
        nic.behave(|behaviour| behaviour.num_buffers = Some(0));
        nic.receive(&frame(1));
    });
    for buffers in [2, 64, 65, u16::MAX] {
        rx_lie("num_buffers above what came", |nic| {
            nic.behave(|behaviour| behaviour.num_buffers = Some(buffers));
            nic.receive(&frame(1));
        });
    }
}

#[test]
fn a_queue_that_ended_is_not_refilled() {
    let mut bench = Bench::new(Behaviour { out_of_order: true, ..Behaviour::default() });
    for _ in 0..3 {
        (0..21).for_each(|number| assert!(bench.nic.receive(&frame(number))));
        let burst = bench.receive();
        assert_eq!(burst.len(), 21);
        bench.free(burst);
    }
    // The first of 64 descriptors completes last. The whole ring then has room at once, and that last
    // completion is invalid.
    bench.nic.behave(|behaviour| behaviour.num_buffers = Some(0));
    assert!(bench.nic.receive(&frame(0)));
    for _ in 0..3 {
        let burst = bench.receive();
        bench.free(burst);
    }
    assert!(bench.rx.is_broken());
    let counted = bench.rx.counters().read();
    assert_eq!((counted.packets, counted.no_buffer), (63, 0));
}

#[test]
fn what_was_received_behind_a_lie_is_counted() {
    type Violation = fn(&VirtioNet);
    let lies: [(&str, u64, Violation); 4] = [
        ("id beyond the ring", 7, |nic| nic.push_used(RX, 40_000, 72)),
        ("length below the header", 7, |nic| nic.push_used(RX, 3, 5)),
        ("num_buffers 0", 7, |nic| {
            nic.behave(|behaviour| behaviour.num_buffers = Some(0));
            nic.receive(&frame(1));
            nic.behave(|behaviour| behaviour.num_buffers = None);
        }),
        ("index ahead", 0, |nic| nic.jump_used(RX, 1000)),
    ];
    for (what, unread, violation) in lies {
        let mut bench = Bench::new(Behaviour::default());
        (0..3).for_each(|number| assert!(bench.nic.receive(&frame(number))));
        let burst = bench.receive();
        assert_eq!(burst.len(), 3);
        bench.free(burst);
        violation(&bench.nic);
        (0..5).for_each(|number| assert!(bench.nic.receive(&frame(number))));
        assert!(bench.receive().is_empty() && bench.rx.is_broken(), "{what}");
        // These frames arrive until the port is stopped.
        (5..7).for_each(|number| assert!(bench.nic.receive(&frame(number))));
        assert!(bench.receive().is_empty(), "{what}");
        bench.device.stop_pair(bench.rx, bench.tx, &mut bench.cache).unwrap();
        assert_eq!(bench.device.counters().read().rx_sum().unread, unread, "{what}");
    }
}

#[test]
fn every_lie_about_sent_frames_is_counted_and_stops_the_queue() {
    type Violation = fn(&VirtioNet);
    let lies: [(&str, Violation); 7] = [
        ("id far beyond the ring", |nic| nic.push_used(TX, 40_000, 0)),
        ("id one beyond the ring", |nic| nic.push_used(TX, 64, 0)),
        ("id that was not sent", |nic| nic.push_used(TX, 20, 0)),
        ("index ahead", |nic| nic.jump_used(TX, 1000)),
        ("index one behind", |nic| nic.jump_used(TX, u16::MAX)),
        ("id twice", |nic| (0..2).for_each(|_| nic.push_used(TX, 0, 0))),
        ("id twice, out of order", |nic| (0..2).for_each(|_| nic.push_used(TX, 5, 0))),
    ];
    for (what, violation) in lies {
        let mut bench = Bench::new(Behaviour::default());
        assert_eq!(bench.send((0..10).map(frame)), 10);
        violation(&bench.nic);
        assert_eq!(bench.send([]), 0);
        assert_eq!((bench.tx.counters().device_errors.get(), bench.tx.is_broken()), (1, true), "{what}");
        for _ in 0..3 {
            assert_eq!(bench.send([frame(1)]), 0, "{what}");
        }
        assert_eq!(bench.tx.counters().device_errors.get(), 1, "{what}");
        assert!(bench.nic.receive(&frame(1)));
        assert_eq!(bench.receive().len(), 1, "the other direction goes on");
        let lost = 1;
        assert_eq!(bench.stop().0, BUFFERS - lost, "{what}");
    }
}

/// With in-order completion, the driver reads only the used index of a TX queue.
#[test]
fn a_used_index_that_cannot_be_stops_the_queue_of_a_device_in_order() {
    for count in [11, 1000, u16::MAX] {
        let mut bench = Bench::new(in_order());
        assert_eq!(bench.send((0..10).map(frame)), 10);
        bench.nic.jump_used(TX, count);
        assert_eq!(bench.send([]), 0);
        assert_eq!((bench.tx.counters().device_errors.get(), bench.tx.is_broken()), (1, true), "{count}");
        assert_eq!(bench.stop().0, BUFFERS, "{count}");
    }
}

fn refusal(behaviour: Behaviour) -> String {
    Device::probe(VirtioNet::new(behaviour).function()).unwrap_err().to_string()
}

#[test]
fn a_device_that_lacks_something_is_refused_with_the_flag_that_adds_it() {
    assert_eq!(
        refusal(without(feature::ACCESS_PLATFORM)),
        "cannot use virtio NIC 0000:00:03.0: it bypasses the IOMMU: VIRTIO_F_ACCESS_PLATFORM is not offered; \
         in QEMU: -device virtio-net-pci,iommu_platform=on; in libvirt: <driver iommu='on'/>; or remove the IOMMU \
         from the virtual machine and use --vfio-mode noiommu"
    );
    let open = Behaviour { iommu: false, ..without(feature::ACCESS_PLATFORM) };
    assert!(Device::probe(VirtioNet::new(open).function()).is_ok());
    let modern =
        |text: &str| ["in a cloud", "libvirt", "disable-legacy=on"].iter().all(|way| text.contains(way));
    assert!(modern(&refusal(without(feature::VERSION_1))));
    let legacy = VirtioNet::default();
    legacy.config().set(6, &[0, 0]);
    let error = Device::probe(legacy.function()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(modern(&error.to_string()) && error.to_string().contains("virtio 0.9"), "{error}");
}

#[test]
fn a_device_that_breaks_the_rules_of_start_up_is_refused() {
    let normal = Behaviour::default;
    let cases = [
        (Behaviour { refuse_features: true, ..normal() }, "refuses features"),
        (Behaviour { config_changes: true, ..normal() }, "changed during each of 100 reads"),
        (Behaviour { removed: true, ..normal() }, "does not answer"),
        (Behaviour { needs_reset: true, ..normal() }, "DEVICE_NEEDS_RESET"),
    ];
    for (behaviour, why) in cases {
        let error = refusal(behaviour);
        assert!(error.contains(why), "{error}");
    }
    let cases = [
        (Behaviour { queue_size: 0, ..normal() }, "no virtqueue 0"),
        (Behaviour { queue_size: 100, ..normal() }, "not a power of two"),
        (Behaviour { notify_off: Some(0x400), ..normal() }, "beyond the 0x1000 bytes of doorbells"),
        (Behaviour { control_answer: Some(1), ..normal() }, "answered with an error"),
    ];
    for (behaviour, why) in cases {
        let nic = VirtioNet::new(behaviour);
        let (memory, mut cache) = memory(BUFFERS);
        nic.attach(memory.device_view().unwrap());
        let mut device = Device::probe(nic.function()).unwrap();
        let error = device.start_pair(&CONFIG, &memory, &mut cache).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
        let pool = Arc::clone(cache.pool());
        drop(cache);
        assert_eq!((pool.available(), nic.is_live()), (BUFFERS, false), "{why}");
    }
}

#[test]
fn a_device_that_fails_after_probe_does_not_start() {
    let nic = VirtioNet::default();
    let (memory, mut cache) = memory(BUFFERS);
    nic.attach(memory.device_view().unwrap());
    let mut device = Device::probe(nic.function()).unwrap();
    nic.behave(|behaviour| behaviour.control_answer = None);
    let error = device.start_pair(&CONFIG, &memory, &mut cache).unwrap_err();
    assert!(error.to_string().contains("within 1 s"), "{error}");
    let config = PortConfig::with_descriptors(100, 64);
    assert_eq!(device.start_pair(&config, &memory, &mut cache).unwrap_err().kind(), ErrorKind::Usage);
    nic.behave(|behaviour| behaviour.control_answer = Some(0));
    nic.behave(|behaviour| behaviour.needs_reset = true);
    let error = device.start_pair(&CONFIG, &memory, &mut cache).unwrap_err();
    assert!(error.to_string().contains("DEVICE_NEEDS_RESET"), "{error}");
    nic.behave(|behaviour| behaviour.needs_reset = false);
    let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
    assert_eq!(device.start_pair(&CONFIG, &memory, &mut cache).unwrap_err().kind(), ErrorKind::Usage);
    device.stop_pair(rx, tx, &mut cache).unwrap();
}

#[test]
fn capabilities_that_loop_or_point_outside_are_refused() {
    // The first capability is `common` at 0x40, with link, BAR, offset and length at +1, +4, +8 and +12.
    let cases: [(u16, &[u8], &str); 5] = [
        (0x41, &[0x40], "the list loops"),
        (0x41, &[0x10], "points into the header"),
        (0x44, &[5], "there is none"),
        (0x48, &[0xff; 4], "in a BAR of 0x3000"),
        (0x4c, &[8, 0, 0, 0], "describes 0x8 bytes"),
    ];
    for (at, bytes, why) in cases {
        let nic = VirtioNet::default();
        nic.config().set(at, bytes);
        let error = Device::probe(nic.function()).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    // With a reserved BAR number the driver skips the capability, so it is missing.
    let nic = VirtioNet::default();
    nic.config().set(0x44, &[6]);
    assert!(Device::probe(nic.function()).unwrap_err().to_string().contains("legacy interface only"));
}
