//! Counters of queues and ports. Any thread may read them at any time, while lcores forward.
//!
//! A counter has one writer at a time: the lcore that owns the queue or, for a vhost ring, the thread that
//! holds the ring. An addition therefore needs no locked instruction, and a reader costs the writer at most
//! one cache miss.

use std::ops::AddAssign;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use postcard_schema::Schema;
use serde::{Deserialize, Serialize};
use vireo_eal::sync::atomic::{AtomicU64, Ordering};

/// A counter with one writer at a time and any number of readers.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds `n`. If two threads add at the same time, one addition may be lost.
    #[inline(always)]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Returns the current count.
    #[inline(always)]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Queue directions, as counter names spell them.
const RX: &str = "rx";
const TX: &str = "tx";

macro_rules! queue_counters {
    ($($(#[$doc:meta])* $field:ident: $($direction:ident)+;)*) => {
        /// Counters of a queue. They outlive the queue: when a port restarts, its queues continue to count in
        /// them.
        // The counters of each burst share a cache line, which holds no other queue's counters.
        #[derive(Debug, Default)]
        #[repr(C, align(64))]
        pub struct QueueCounters { $($(#[$doc])* pub $field: Count),* }

        /// Values of [`QueueCounters`] at one point in time.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, Schema)]
        pub struct QueueStats { $($(#[$doc])* pub $field: u64),* }

        impl QueueCounters {
            /// Returns the current values.
            pub fn read(&self) -> QueueStats {
                QueueStats { $($field: self.$field.get()),* }
            }

            /// Adds what another process has counted.
            pub fn add(&self, stats: &QueueStats) {
                $(self.$field.add(stats.$field);)*
            }
        }

        impl QueueStats {
            /// Returns what was counted since the counters had the values `before`.
            #[must_use]
            pub fn since(&self, before: &Self) -> Self {
                Self { $($field: self.$field.wrapping_sub(before.$field)),* }
            }
        }

        impl AddAssign for QueueStats {
            fn add_assign(&mut self, more: Self) {
                $(self.$field += more.$field;)*
            }
        }

        /// Each counter, once per direction that has it: direction, name and accessor.
        const NAMES: &[(&str, &str, fn(&QueueStats) -> u64)] =
            &[$($((stringify!($direction), stringify!($field), |stats| stats.$field)),+),*];
    };
}

// Counters are reported in this order. The packet path writes the first six counters.
queue_counters! {
    /// Packets received, or handed to the device. On ports started for frames of several packets, counts
    /// frames.
    packets: rx tx;
    /// Bytes of these packets, without the frame check sequence.
    bytes: rx tx;
    /// Packets dropped because the device marked them bad, or because they exceed the port's maximum frame
    /// length.
    errors: rx tx;
    /// Times that an RX queue found no free buffer to receive into.
    no_buffer: rx;
    /// Completions that contradict the driver's own record of the ring.
    device_errors: rx tx;
    /// Doorbell writes.
    doorbells: rx tx;
    /// Buffers that the device had filled but the application had not received when an RX queue stopped;
    /// lost.
    unread: rx;
    /// Packets that a TX queue had handed to the device when the queue stopped and whose transmission is
    /// unconfirmed. On an Intel NIC started for frames of several packets, each packet of a frame counts.
    unfinished: tx;
    /// Packets from an RX queue that the application kept instead of sending them.
    consumed: rx;
    /// Packets for a TX queue that the application dropped because the queue was full, or that were lost with a process.
    dropped: tx;
    /// Times that an RX queue was [tied](crate::tied) to a TX queue.
    tied: rx;
    /// Times that a tied RX queue met a packet or a completion that was not as expected, and was untied.
    untied: rx;
    /// Polls in which all buffers of a tied RX queue waited in the TX queue. The NIC drops what arrives
    /// meanwhile.
    starved: rx;
    /// Packets whose TCP or UDP checksum the device verified as correct. Counted only with
    /// [`Offloads::RX_CHECKSUM`](crate::port::Offloads::RX_CHECKSUM).
    checksum_good: rx;
    /// Packets received with a partial checksum. Counted only with `Offloads::RX_CHECKSUM`.
    checksum_partial: rx;
    /// Packets whose checksum the device was told to compute, with
    /// [`Offloads::TX_CHECKSUM`](crate::port::Offloads::TX_CHECKSUM).
    checksum_offloaded: tx;
    /// Packets whose checksum the application computed because the device does not.
    checksum_computed: tx;
}

const _: () =
    assert!(cfg!(loom) || std::mem::offset_of!(QueueCounters, doorbells) + size_of::<Count>() <= 64);

/// Counters of a port: a handle, whose clones share the same counters. They outlive the port.
#[derive(Clone, Debug, Default)]
pub struct PortCounters(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    rx: List,
    tx: List,
    device: Vec<(&'static str, Count)>,
}

/// Counters of queues, by queue number. The lock is held to look up a queue's counters, never to count.
#[derive(Debug, Default)]
struct List(Mutex<Vec<Arc<QueueCounters>>>);

impl List {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<QueueCounters>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, number: usize) -> Arc<QueueCounters> {
        let mut queues = self.lock();
        if queues.len() <= number {
            queues.resize_with(number + 1, Arc::default);
        }
        Arc::clone(&queues[number])
    }

    fn read(&self) -> Vec<QueueStats> {
        self.lock().iter().map(|queue| queue.read()).collect()
    }
}

impl PortCounters {
    /// Creates the counters of a port whose device has counters of its own, with these names.
    pub fn with_device(names: impl IntoIterator<Item = &'static str>) -> Self {
        let device = names.into_iter().map(|name| (name, Count::default())).collect();
        Self(Arc::new(Inner { device, ..Inner::default() }))
    }

    /// Returns the counters of RX queue `number`, the same at each start of the port. A driver requests them
    /// for each queue that it starts.
    pub fn rx(&self, number: usize) -> Arc<QueueCounters> {
        self.0.rx.get(number)
    }

    /// Returns the counters of TX queue `number`; see [`PortCounters::rx`].
    pub fn tx(&self, number: usize) -> Arc<QueueCounters> {
        self.0.tx.get(number)
    }

    /// Returns the device's own counters, in the order of [`PortCounters::with_device`]. Only the thread that
    /// owns the device writes them.
    pub fn device(&self) -> impl Iterator<Item = &Count> {
        self.0.device.iter().map(|(_, count)| count)
    }

    /// Returns the current values, for a process that continues to count.
    pub(crate) fn record(&self) -> CountersRecord {
        let PortStats { rx, tx, device } = self.read();
        CountersRecord { rx, tx, device: device.into_iter().map(|(_, count)| count).collect() }
    }

    /// Continues to count from the values of `record`.
    pub(crate) fn restore(&self, record: &CountersRecord) {
        record.rx.iter().enumerate().for_each(|(number, stats)| self.rx(number).add(stats));
        record.tx.iter().enumerate().for_each(|(number, stats)| self.tx(number).add(stats));
        self.device().zip(&record.device).for_each(|(count, more)| count.add(*more));
    }

    /// Returns the current values. Values of different queues, or a queue's packets and bytes, may be read at
    /// slightly different times.
    pub fn read(&self) -> PortStats {
        let device = self.0.device.iter().map(|(name, count)| (*name, count.get())).collect();
        PortStats { rx: self.0.rx.read(), tx: self.0.tx.read(), device }
    }
}

/// Values of [`PortCounters`], for another process.
#[derive(Clone, Debug, Default, Serialize, Deserialize, Schema)]
pub(crate) struct CountersRecord {
    rx: Vec<QueueStats>,
    tx: Vec<QueueStats>,
    /// In the order of [`PortCounters::with_device`].
    device: Vec<u64>,
}

/// Values of [`PortCounters`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortStats {
    /// Values of the RX queues, by queue number.
    pub rx: Vec<QueueStats>,
    /// Values of the TX queues, by queue number.
    pub tx: Vec<QueueStats>,
    /// Values of the device's own counters, by name, as of the last [`Nic::check`](crate::port::Nic::check)
    /// or stop.
    pub device: Vec<(&'static str, u64)>,
}

impl PortStats {
    /// Returns the sum over the RX queues.
    pub fn rx_sum(&self) -> QueueStats {
        sum(&self.rx)
    }

    /// Returns the sum over the TX queues.
    pub fn tx_sum(&self) -> QueueStats {
        sum(&self.tx)
    }

    /// Returns the port's sums by name (`rx_packets`): RX queues, TX queues, then the device's own counters.
    pub fn sums(&self) -> Vec<(String, u64)> {
        let queues = [(RX, self.rx_sum()), (TX, self.tx_sum())].into_iter().flat_map(|(direction, stats)| {
            named(direction, stats).map(move |(name, count)| (format!("{direction}_{name}"), count))
        });
        queues.chain(self.device.iter().map(|(name, count)| ((*name).to_owned(), *count))).collect()
    }

    /// Returns the counters of each queue by name (`rx_q0_packets`, as in DPDK): RX queues by number, then TX
    /// queues by number.
    pub fn of_queues(&self) -> Vec<(String, u64)> {
        let queues = [(RX, &self.rx), (TX, &self.tx)].into_iter().flat_map(|(direction, queues)| {
            queues.iter().enumerate().map(move |(number, stats)| (direction, number, *stats))
        });
        queues
            .flat_map(|(direction, number, stats)| {
                named(direction, stats)
                    .map(move |(name, count)| (format!("{direction}_q{number}_{name}"), count))
            })
            .collect()
    }

    /// Returns the counters for human readers: [`PortStats::sums`], with [`PortStats::of_queues`] if there
    /// are several queues.
    pub fn summary(&self) -> Vec<(String, u64)> {
        if self.has_several_queues() { self.named() } else { self.sums() }
    }

    /// Whether the port has more than one RX queue or more than one TX queue. If not, the counters of its
    /// queues equal its sums.
    pub fn has_several_queues(&self) -> bool {
        self.rx.len().max(self.tx.len()) > 1
    }

    /// Returns [`PortStats::sums`], then [`PortStats::of_queues`]. Each name occurs once, and each sum covers
    /// the queues listed after it.
    pub fn named(&self) -> Vec<(String, u64)> {
        let mut all = self.sums();
        all.append(&mut self.of_queues());
        all
    }
}

fn sum(queues: &[QueueStats]) -> QueueStats {
    queues.iter().fold(QueueStats::default(), |mut sum, stats| {
        sum += *stats;
        sum
    })
}

/// Returns the counters of a queue in `direction`, by name.
fn named(direction: &'static str, stats: QueueStats) -> impl Iterator<Item = (&'static str, u64)> {
    let of_direction = NAMES.iter().filter(move |(other, ..)| *other == direction);
    of_direction.map(move |(_, name, of)| (*name, of(&stats)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::intel::Drops;

    /// Counters of a port with two queues in each direction and device counters.
    fn port() -> PortCounters {
        let port = Drops::port_counters();
        port.device().for_each(|count| count.add(7));
        for number in 0..2 {
            let (rx, tx) = (port.rx(number), port.tx(number));
            let number = number as u64;
            rx.packets.add(10 + number);
            rx.no_buffer.add(20 + number);
            tx.packets.add(30 + number);
            tx.dropped.add(40 + number);
        }
        port
    }

    #[test]
    fn each_name_is_there_once_and_in_order() {
        let names: Vec<String> = port().read().named().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "{names:?}");
        let begin = |prefix: &str| names.iter().position(|name| name.starts_with(prefix)).unwrap();
        let order =
            ["rx_packets", "tx_packets", "rx_missed", "rx_q0_", "rx_q1_", "tx_q0_", "tx_q1_"].map(begin);
        assert!(order.is_sorted(), "{names:?}");
        assert!(!names.iter().any(|name| name.starts_with("tx") && name.ends_with("no_buffer")));
        assert!(!names.iter().any(|name| name.starts_with("rx") && name.ends_with("dropped")));
    }

    #[test]
    fn the_sum_over_queues_is_the_ports() {
        let stats = port().read();
        assert_eq!((stats.rx_sum().packets, stats.tx_sum().packets), (21, 61));
        let (sums, of_queues) = (stats.sums(), stats.of_queues());
        for (name, sum) in sums.iter().take(sums.len() - stats.device.len()) {
            let (direction, rest) = name.split_once('_').unwrap();
            let of_queue = |number| {
                let name = format!("{direction}_q{number}_{rest}");
                of_queues.iter().find(|(other, _)| *other == name).unwrap().1
            };
            assert_eq!(*sum, of_queue(0) + of_queue(1), "{name}");
        }
        assert!(
            sums.contains(&("rx_no_buffer".into(), 41)) && sums.contains(&("rx_missed_errors".into(), 7))
        );
    }

    #[test]
    fn a_clone_and_a_later_start_see_the_same_counters() {
        let port = port();
        let other = port.clone();
        port.rx(1).packets.add(5);
        port.rx(2).packets.add(100);
        assert_eq!((other.read().rx_sum().packets, other.read().tx.len()), (126, 2));
    }

    #[test]
    fn another_thread_sees_a_count_grow() {
        let port = PortCounters::default();
        let counters = port.rx(0);
        let seen = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut last = QueueStats::default();
                while last.packets < 1000 {
                    let now = port.read().rx_sum();
                    assert!(now.packets >= last.packets && now.bytes >= last.bytes, "{now:?} {last:?}");
                    last = now;
                }
                seen.store(true, Ordering::Relaxed);
            });
            while !seen.load(Ordering::Relaxed) {
                counters.packets.add(1);
                counters.bytes.add(60);
            }
        });
        assert!(counters.packets.get() >= 1000);
    }
}
