//! Misbehaving devices under a running application. The misbehavior is counted, the port is restarted,
//! forwarding continues, other ports are unaffected, and no buffer is lost.

mod secondaries;
mod setup;

use std::sync::Arc;
use std::time::{Duration, Instant};

use vireo_drivers::fakedev::e1000::Faults;
use vireo_drivers::fakedev::virtio::{RX, TX, VirtioNet};
use vireo_drivers::port::{Nic, PortConfig, QueuesOf};
use vireo_drivers::table::Port;
use vireo_eal::dma::{DATA_ROOM, DmaMemory, Pool};
use vireo_eal::event::is_signaled;
use vireo_eal::mem::{Backing, Region};

pub(crate) use self::setup::app;
use self::setup::{BUFFERS, CONFIG, Device, Setup, await_inspection, frame, passes, until};
use super::{INSPECTION_PERIOD, SupervisedPort};

#[test]
fn every_lie_of_virtio_is_counted_and_its_port_restarted() {
    type Lie = (&'static str, fn(&VirtioNet));
    let lies: [Lie; 12] = [
        ("id far beyond the ring", |nic| nic.push_used(RX, 40_000, 72)),
        ("id of another lap", |nic| nic.push_used(RX, 300, 72)),
        ("length beyond the buffer", |nic| nic.push_used(RX, 40, 70_000)),
        ("length of one byte too many", |nic| nic.push_used(RX, 40, (12 + DATA_ROOM + 1) as u32)),
        ("length -1", |nic| nic.push_used(RX, 40, u32::MAX)),
        ("length below the header", |nic| nic.push_used(RX, 40, 5)),
        ("index ahead", |nic| nic.jump_used(RX, 1000)),
        ("index behind", |nic| nic.jump_used(RX, 65_000)),
        ("num_buffers 0", |nic| deliver_as(nic, 0)),
        ("num_buffers 65535", |nic| deliver_as(nic, u16::MAX)),
        ("sent id far beyond the ring", |nic| nic.push_used(TX, 40_000, 0)),
        ("sent index ahead", |nic| nic.jump_used(TX, 1000)),
    ];
    for (what, lie) in lies {
        let is_sent = what.starts_with("sent");
        let counted = Setup::new(true).run(|devices| {
            let before = devices[0].resets();
            lie(devices[0].virtio());
            let is_reset = || {
                // The driver inspects a TX ring when there is something to send. Sent frames are taken out,
                // so that only the misbehavior can stop the queue.
                if is_sent {
                    devices[1].receive(&frame(0));
                    devices[0].transmitted();
                }
                devices[0].resets() != before
            };
            until(is_reset, &format!("{what}: no reset"));
        });
        let expected = if is_sent { (0, 1) } else { (1, 0) };
        assert_eq!((counted.device_errors, counted.restarts), (expected, 1), "{what}");
    }
}

/// Delivers a frame that claims to be in `num_buffers` buffers. While a busy machine leaves the ring without
/// buffers, there is nothing to deliver it into.
fn deliver_as(nic: &VirtioNet, num_buffers: u16) {
    nic.behave(|behaviour| behaviour.num_buffers = Some(num_buffers));
    until(|| nic.receive(&frame(1)), "the ring has no buffers");
    nic.behave(|behaviour| behaviour.num_buffers = None);
}

/// A virtio port is not reset in this case, because its device may be waiting for a switch that restarts.
#[test]
fn an_e1000_that_sends_nothing_is_reset() {
    let counted = Setup::new(false).run(|devices| {
        let device = &devices[0];
        device.e1000().set_faults(Faults { never_done: true, ..Faults::default() });
        let before = device.resets();
        let is_reset = || {
            devices[1].receive(&frame(0));
            device.resets() != before
        };
        until(is_reset, "no reset");
        device.e1000().set_faults(Faults::default());
    });
    assert_eq!((counted.device_errors.0, counted.restarts), (0, 1));
}

#[test]
fn a_device_that_asks_for_a_reset_or_goes_away_is_taken_back() {
    for virtio in [true, false] {
        let faults: &[fn(&Device, bool)] = match virtio {
            true => {
                &[|device, on| device.virtio().behave(|behaviour| behaviour.needs_reset = on), Device::vanish]
            }
            false => &[Device::vanish],
        };
        for fault in faults {
            let counted = Setup::new(virtio).run(|devices| {
                fault(&devices[0], true);
                // The partner of the port is cut off, and the other ports continue.
                for round in 0..100 {
                    passes(&devices[2], &devices[3], 1 << 30 | round << 16, "others");
                }
                await_inspection(&devices[0]);
                fault(&devices[0], false);
            });
            assert!(counted.restarts >= 1);
        }
    }
}

/// The spare buffers of the pool are fewer than an RX ring needs, and more than all TX rings can hold. The
/// restarted port must therefore get back the buffers that it had, and those in the lcores' caches.
#[test]
fn a_port_comes_up_again_from_a_pool_that_is_hardly_large_enough() {
    let config = PortConfig::with_descriptors(256, 64);
    for virtio in [true, false] {
        let counted = Setup { config, buffers: 4 * 256 + 240, ..Setup::new(virtio) }.run(|devices| {
            devices[0].vanish(true);
            await_inspection(&devices[0]);
            devices[0].vanish(false);
        });
        assert!(counted.restarts >= 1);
    }
}

/// The TX queue of the restarted port is polled by no lcore.
#[test]
fn a_port_that_forwards_one_way_is_restarted() {
    for virtio in [true, false] {
        let counted = Setup { ways: &[(1, 0, 1)], ..Setup::new(virtio) }.run(|devices| {
            let before = devices[0].resets();
            devices[0].vanish(true);
            await_inspection(&devices[0]);
            devices[0].vanish(false);
            until(|| devices[0].resets() != before, "no reset");
        });
        assert!(counted.restarts >= 1);
    }
}

#[test]
fn bad_frames_of_an_e1000_are_dropped_without_a_reset() {
    const DD: u64 = 1 << 32;
    const EOP: u64 = 1 << 33;
    const CRC_ERROR: u64 = 1 << 40;
    let counted = Setup::new(false).run(|devices| {
        let nic = devices[0].e1000();
        for word in [DD | EOP, DD | EOP | 0xFFFF, DD | EOP | 60 | CRC_ERROR] {
            nic.receive_raw(word);
        }
        // Two parts of one frame, which the second descriptor ends.
        nic.receive_raw(DD | 60);
        nic.receive_raw(DD | EOP | 60);
    });
    assert_eq!((counted.device_errors, counted.errors, counted.restarts), ((2, 0), 2, 0));
}

/// Starts a port of its own, and calls `body` with its device, the port, its queues and its pool.
fn with_port(
    virtio: bool,
    config: &PortConfig,
    body: impl FnOnce(&Device, SupervisedPort, QueuesOf<Port>, &Arc<Pool>),
) {
    let region = Region::new(Pool::bytes(BUFFERS) + (1 << 20), Backing::SmallPages).unwrap();
    let memory = DmaMemory::map(region, &[]).unwrap();
    let pool = Pool::new(&memory, BUFFERS).unwrap();
    let (device, open) = Device::new(virtio, 0, &memory);
    let mut port = SupervisedPort::new(open);
    let queues = port.open.as_mut().unwrap().port.start(config, &memory, &mut pool.cache()).unwrap();
    body(&device, port, queues, &pool);
}

#[test]
fn a_change_of_a_link_asks_for_an_inspection_of_a_port_that_runs() {
    let config = CONFIG.with_pairs(1).with_link_interrupt(true);
    for virtio in [true, false] {
        with_port(virtio, &config, |device, mut port, queues, pool| {
            port.begin();
            device.set_link(false);
            assert!(port.link_event().is_none(), "the port has just been started");
            port.last_start -= Duration::from_secs(1);
            assert!(is_signaled(port.link_event().unwrap()));
            port.link_change(0);
            assert!(
                port.link_event().is_none(),
                "a device that signals all the time does not keep anybody busy"
            );
            port.last_link_event = Some(Instant::now() - INSPECTION_PERIOD);
            assert!(!is_signaled(port.link_event().unwrap()), "the inspection takes the event");
            device.set_link(true);
            assert!(is_signaled(port.link_event().unwrap()));
            port.is_down = true;
            assert!(port.link_event().is_none(), "nobody inspects the link of a port that is down");
            port.stop(Some(queues), &mut pool.cache());
        });
    }
}

#[test]
fn a_stop_that_is_not_confirmed_is_tried_again() {
    for virtio in [true, false] {
        with_port(virtio, &CONFIG.with_pairs(1), |device, mut port, queues, pool| {
            let mut cache = pool.cache();
            device.vanish(true);
            port.stop(Some(queues), &mut cache);
            let told = port.unconfirmed.as_ref().unwrap().to_string();
            assert!(told.contains("reset"), "{told}");
            port.stop(None, &mut cache);
            assert!(port.unconfirmed.is_some());
            device.vanish(false);
            port.stop(None, &mut cache);
            assert!(port.unconfirmed.is_none());
            drop(cache);
            assert_eq!(pool.available(), BUFFERS);
        });
    }
}
