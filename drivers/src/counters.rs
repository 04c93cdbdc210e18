//! What queues and ports count. Any thread may read the counters at any time, while lcores forward.
//!
//! A count has one writer at a time: the lcore that owns the queue, and of a vhost ring the thread that holds its place. So an
//! addition needs no locked instruction, and a reader costs the writer a cache miss at most.

use std::ops::AddAssign;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vireo_eal::sync::atomic::{AtomicU64, Ordering};

/// A count with one writer at a time and any readers.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds `n`. Of two threads that add at the same time, one may lose its addition.
    #[inline(always)]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// The count so far.
    #[inline(always)]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Directions of a queue, as names have them.
const RX: &str = "rx";
const TX: &str = "tx";

macro_rules! queue_counters {
    ($($(#[$doc:meta])* $field:ident: $($direction:ident)+;)*) => {
        /// Counters of a queue. They outlive the queue: those of a port's restarted queue go on.
        // The counts of each burst share a cache line, which no other queue's counts are in.
        #[derive(Debug, Default)]
        #[repr(C, align(64))]
        pub struct QueueCounters { $($(#[$doc])* pub $field: Count),* }

        /// Values of [`QueueCounters`] at one time.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct QueueStats { $($(#[$doc])* pub $field: u64),* }

        impl QueueCounters {
            /// The values now.
            pub fn read(&self) -> QueueStats {
                QueueStats { $($field: self.$field.get()),* }
            }
        }

        impl AddAssign for QueueStats {
            fn add_assign(&mut self, more: Self) {
                $(self.$field += more.$field;)*
            }
        }

        /// Each count with the direction of the queues that have it, and its name there.
        const NAMES: &[(&str, &str, fn(&QueueStats) -> u64)] =
            &[$($((stringify!($direction), stringify!($field), |stats| stats.$field)),+),*];
    };
}

// The order is that of the names. The packet path writes the first six.
queue_counters! {
    /// Packets received, or handed to the device: frames, where one may be several packets.
    packets: rx tx;
    /// Bytes of these packets, without frame check sequence.
    bytes: rx tx;
    /// Packets that the device marked bad, or that are longer than the port was started for; dropped.
    errors: rx tx;
    /// Times that an RX queue found no free buffer to receive into.
    no_buffer: rx;
    /// Completions that contradict the driver's own record of the ring.
    device_errors: rx tx;
    /// Doorbell writes.
    doorbells: rx tx;
    /// Buffers that the device had filled and nobody had received when an RX queue was stopped; lost.
    unread: rx;
    /// Packets that a TX queue had handed to the device when it was stopped, and of which nothing says that they were
    /// sent. Where a frame may be several packets of an Intel NIC, each of them counts.
    unfinished: tx;
    /// Packets from an RX queue that the application kept instead of sending them.
    consumed: rx;
    /// Packets for a TX queue that the application dropped because the queue was full.
    dropped: tx;
    /// Packets whose TCP or UDP checksum the device found right; with
    /// [`Offloads::RX_CHECKSUM`](crate::port::Offloads::RX_CHECKSUM).
    checksum_good: rx;
    /// Packets that came with a partial checksum; with the same.
    checksum_partial: rx;
    /// Packets whose checksum the device was told to make; with
    /// [`Offloads::TX_CHECKSUM`](crate::port::Offloads::TX_CHECKSUM).
    checksum_offloaded: tx;
    /// Packets whose checksum the application made, because the device does not.
    checksum_computed: tx;
}

const _: () =
    assert!(cfg!(loom) || std::mem::offset_of!(QueueCounters, doorbells) + size_of::<Count>() <= 64);

/// Counters of a port: a handle, whose clones name the same counters. They outlive the port.
#[derive(Clone, Debug, Default)]
pub struct PortCounters(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    rx: List,
    tx: List,
    device: Vec<(&'static str, Count)>,
}

/// Counters of queues, by number. Locked to find those of a queue, and never while it counts.
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
    /// Counters of a port whose device has counters of its own with these names.
    pub fn with_device(names: impl IntoIterator<Item = &'static str>) -> Self {
        let device = names.into_iter().map(|name| (name, Count::default())).collect();
        Self(Arc::new(Inner { device, ..Inner::default() }))
    }

    /// Counters of RX queue `number`, the same in each start of the port. A driver asks for those of each queue that it starts.
    pub fn rx(&self, number: usize) -> Arc<QueueCounters> {
        self.0.rx.get(number)
    }

    /// Counters of TX queue `number`, as [`PortCounters::rx`].
    pub fn tx(&self, number: usize) -> Arc<QueueCounters> {
        self.0.tx.get(number)
    }

    /// The device's own counters, in the order of [`PortCounters::with_device`]. The thread that owns the device writes them.
    pub fn device(&self) -> impl Iterator<Item = &Count> {
        self.0.device.iter().map(|(_, count)| count)
    }

    /// The values now. Those of two queues, or of a queue's packets and bytes, may be a moment apart.
    pub fn read(&self) -> PortStats {
        let device = self.0.device.iter().map(|(name, count)| (*name, count.get())).collect();
        PortStats { rx: self.0.rx.read(), tx: self.0.tx.read(), device }
    }
}

/// Values of [`PortCounters`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortStats {
    /// Of the RX queues, by number.
    pub rx: Vec<QueueStats>,
    /// Of the TX queues, by number.
    pub tx: Vec<QueueStats>,
    /// The device's own, by name, as of the last [`Nic::check`](crate::port::Nic::check) or stop.
    pub device: Vec<(&'static str, u64)>,
}

impl PortStats {
    /// Sum over the RX queues.
    pub fn rx_sum(&self) -> QueueStats {
        sum(&self.rx)
    }

    /// Sum over the TX queues.
    pub fn tx_sum(&self) -> QueueStats {
        sum(&self.tx)
    }

    /// The port's sums by name (`rx_packets`): those of RX queues, those of TX queues, then the device's own.
    pub fn sums(&self) -> Vec<(String, u64)> {
        let queues = [(RX, self.rx_sum()), (TX, self.tx_sum())].into_iter().flat_map(|(direction, stats)| {
            named(direction, stats).map(move |(name, count)| (format!("{direction}_{name}"), count))
        });
        queues.chain(self.device.iter().map(|(name, count)| ((*name).to_owned(), *count))).collect()
    }

    /// The counts of each queue by name (`rx_q0_packets`, as DPDK has it): the RX queues by number, then the TX queues.
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

    /// [`PortStats::sums`], and [`PortStats::of_queues`] where these say more: what a person reads.
    pub fn summary(&self) -> Vec<(String, u64)> {
        if self.has_several_queues() { self.named() } else { self.sums() }
    }

    /// Whether there are several queues each way or one way. If not, what a queue counted is what the port did.
    pub fn has_several_queues(&self) -> bool {
        self.rx.len().max(self.tx.len()) > 1
    }

    /// [`PortStats::sums`], then [`PortStats::of_queues`]. Each name is there once, and a sum is that of the queues beside it.
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

/// What queues of `direction` count, by name.
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

    /// Two queues each way and a device.
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
