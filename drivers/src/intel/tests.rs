//! Tests of every controller family against the in-process device, with good and misbehaving devices. A
//! family runs them through [`tests_of_every_chip!`].

mod life;
mod long;
mod queues;

use std::cell::Cell;
use std::sync::Arc;

use vireo_bus_pci::{DeviceId, Function};
use vireo_eal::Error;
use vireo_eal::bdf::Bdf;
use vireo_eal::dma::{Burst, DmaMemory, Packet, Pool, PoolCache};
use vireo_eal::mem::{Backing, Region};

pub(crate) use self::life::*;
pub(crate) use self::long::*;
pub(crate) use self::queues::*;
use super::device::Pair;
use super::{Chip, Device, RxQueue};
use crate::counters::QueueStats;
use crate::fakedev::intel::{Fake, Model};
use crate::port::{MacAddr, Nic, PortConfig, RxBurst, TxBurst};

pub(crate) const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
pub(crate) const CONFIG: PortConfig = PortConfig::with_descriptors(64, 64);

/// Controller family under test, with its fake devices.
pub(crate) trait Family: Chip {
    /// Fake device of the family.
    type Model: Model;
    /// Chip for tests that do not depend on the chip.
    const STANDARD: DeviceId;
    /// Chips for tests that may depend on the chip.
    const CHIPS: &'static [DeviceId];
    /// One chip for each way of resetting.
    const KINDS: &'static [DeviceId];
    /// Device address of the test memory.
    const IOVA: u64;
}

/// A started port with its device, and one lcore's pool cache.
pub(crate) struct Rig<F: Family> {
    pub(crate) device: Fake<F::Model>,
    pub(crate) port: Device<F>,
    config: PortConfig,
    queues: Option<Pair<F>>,
    memory: Arc<DmaMemory>,
    pool: Arc<Pool>,
    cache: PoolCache,
}

thread_local! {
    /// Whether this thread's devices behave like the chips instead of QEMU's models.
    pub(crate) static SILICON: Cell<bool> = const { Cell::new(false) };
}

/// Runs `test` with devices that behave like QEMU's models, and again with devices that behave like the
/// chips.
pub(crate) fn in_both_modes(test: impl Fn()) {
    for silicon in [false, true] {
        SILICON.set(silicon);
        test();
    }
}

pub(crate) fn fake<F: Family>(id: DeviceId, mac: MacAddr) -> (Box<dyn Function>, Fake<F::Model>) {
    let make = if SILICON.get() { Fake::silicon } else { Fake::new };
    make(Bdf::new(0, 0, 3, 0).unwrap(), id, mac)
}

pub(crate) fn memory<F: Family>(buffers: u32) -> (Arc<DmaMemory>, Arc<Pool>) {
    let bytes = (Pool::bytes(buffers) + (64 << 10)).next_power_of_two();
    let region = Region::new(bytes, Backing::SmallPages).unwrap();
    let memory = DmaMemory::with_addresses(region, bytes, &[F::IOVA]);
    let pool = Pool::new(&memory, buffers).unwrap();
    (memory, pool)
}

impl<F: Family> Rig<F> {
    pub(crate) fn new(id: DeviceId, config: PortConfig, buffers: u32) -> Self {
        let (function, device) = fake::<F>(id, MAC);
        let (memory, pool) = memory::<F>(buffers);
        device.attach(memory.device_view().unwrap());
        let mut cache = pool.cache();
        let mut port = Device::probe(function).unwrap();
        let queues = Some(port.start_pair(&config, &memory, &mut cache).unwrap());
        Self { device, port, config, queues, memory, pool, cache }
    }

    pub(crate) fn standard() -> Self {
        Self::new(F::STANDARD, CONFIG, 512)
    }

    /// Receives the frames of one poll. The second call receives frames past the end of the ring.
    fn receive(&mut self, burst: &mut Burst) {
        let (rx, _) = self.queues.as_mut().unwrap();
        rx.rx_burst(&mut self.cache, burst);
        rx.rx_burst(&mut self.cache, burst);
    }

    pub(crate) fn poll(&mut self) -> Vec<Vec<u8>> {
        let mut burst = Burst::new();
        self.receive(&mut burst);
        burst.drain(..).map(|packet| self.take(packet)).collect()
    }

    fn take(&mut self, packet: Packet) -> Vec<u8> {
        let mut bytes = vec![0; packet.len()];
        self.cache.read(&packet, 0, &mut bytes);
        self.cache.free(packet);
        bytes
    }

    fn send(&mut self, frames: &[Vec<u8>]) -> usize {
        let mut burst: Burst = frames
            .iter()
            .map(|frame| {
                let mut packet = self.cache.allocate().unwrap().with_len(frame.len());
                self.cache.write(&mut packet, 0, frame);
                packet
            })
            .collect();
        let sent = self.queues.as_mut().unwrap().1.tx_burst(&mut self.cache, &mut burst);
        assert_eq!(burst.len(), frames.len() - sent);
        burst.drain(..).for_each(|packet| self.cache.free(packet));
        sent
    }

    /// Sends `bytes` in the buffer of a longer received frame, whose old data must not be sent. Returns the
    /// transmitted frames.
    pub(crate) fn send_in_used_buffer(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        assert!(self.device.receive(&[0xEE; 60]));
        let mut burst = Burst::new();
        self.receive(&mut burst);
        let packet = burst.pop().unwrap();
        assert!(burst.is_empty());
        let mut packet = packet.with_len(bytes.len());
        self.cache.write(&mut packet, 0, bytes);
        burst.push(packet);
        let (_, tx) = self.queues.as_mut().unwrap();
        assert_eq!(tx.tx_burst(&mut self.cache, &mut burst), 1);
        self.device.transmitted()
    }

    pub(crate) fn rx(&mut self) -> &mut RxQueue<F::Format> {
        &mut self.queues.as_mut().unwrap().0
    }

    /// Name and value of the port's counter of missed frames.
    pub(crate) fn missed(&self) -> (&'static str, u64) {
        self.port.counters().read().device[0]
    }

    pub(crate) fn rx_stats(&self) -> QueueStats {
        self.queues.as_ref().unwrap().0.counters().read()
    }

    /// Stops the port, which can be started again.
    pub(crate) fn pause(&mut self) {
        let (rx, tx) = self.queues.take().unwrap();
        self.port.stop_pair(rx, tx, &mut self.cache).unwrap();
    }

    /// Starts a stopped port.
    pub(crate) fn resume(&mut self) {
        self.queues = Some(self.port.start_pair(&self.config, &self.memory, &mut self.cache).unwrap());
    }

    /// Starts the port, which must fail, and returns the error.
    pub(crate) fn refusal(&mut self) -> Error {
        self.port.start_pair(&self.config, &self.memory, &mut self.cache).unwrap_err()
    }

    pub(crate) fn restart(&mut self) {
        self.pause();
        self.resume();
    }

    /// Stops the port, and asserts that every buffer is back in the pool.
    pub(crate) fn stop(mut self) {
        self.pause();
        drop(self.cache);
        assert_eq!(self.pool.available(), self.pool.count());
        assert!(!self.device.config().bus_master());
    }
}

/// Returns a frame that differs from its neighbors.
pub(crate) fn frame(number: usize) -> Vec<u8> {
    let mut bytes = vec![number as u8; 60 + number % 1400];
    bytes[..8].copy_from_slice(&(number as u64).to_le_bytes());
    bytes
}

fn frames(numbers: std::ops::Range<usize>) -> Vec<Vec<u8>> {
    numbers.map(frame).collect()
}

/// Declares the tests of this module and its submodules as tests of the family `$family`.
macro_rules! tests_of_every_chip {
    ($family:ty) => {
        $crate::intel::tests::tests_of_every_chip! {
            $family:
            packets_pass_in_order_over_many_turns_of_the_rings
            the_receive_doorbell_rings_once_for_32_packets
            a_full_receive_ring_makes_the_device_drop
            a_frame_that_was_dropped_counts_once
            a_full_transmit_ring_takes_what_fits
            a_device_that_never_completes_tx_gets_one_ring_full
            an_empty_pool_is_counted_and_recovered_from
            lies_about_received_frames_are_dropped_and_counted
            a_device_that_completes_without_end_does_not_hold_the_lcore
            a_descriptor_that_is_completed_out_of_its_turn_waits_for_it
            a_port_that_sends_nothing_for_a_second_is_restarted
            frames_of_several_buffers_are_dropped_whole
            long_frames_pass_between_short_ones
            a_frame_waits_for_its_end_and_for_room
            lies_about_long_frames_are_dropped_and_counted
            a_full_transmit_ring_keeps_whole_frames
            frames_that_no_fifo_holds_are_not_sent
            a_device_that_reports_nothing_gets_one_ring_full_of_segments
            frames_beyond_what_the_chip_takes_are_refused
            promiscuous_mode_survives_a_restart_and_rings_keep_their_memory
            a_start_without_buffers_leaves_the_pool_as_it_was
            a_sleeping_phy_is_woken
            a_device_that_does_not_answer_is_refused
            each_chip_is_reset_in_the_way_that_it_survives
            a_chip_that_hangs_in_its_reset_is_reset_by_the_function
            memory_is_kept_when_the_device_cannot_be_stopped
            a_stop_that_is_confirmed_later_gives_the_buffers_back
            starts_that_fail_take_no_memory
            memory_outlives_all_that_a_program_can_drop_while_the_nic_runs
            sent_buffers_go_back_to_the_pool_that_they_came_from
            a_port_that_is_dropped_stops_its_device
            a_port_stops_with_its_own_queues_only
            rings_of_every_size_have_room_in_what_the_driver_asks_for
            an_interrupt_line_that_nobody_serves_stays_silent
            changes_of_the_link_are_signaled
            a_sleeping_queue_passes_changes_of_the_link_on
            flow_control_is_what_the_ends_of_the_link_agreed_on
            pause_frames_are_obeyed_and_never_received
        }
    };
    ($family:ty: $($test:ident)*) => {
        $(
            #[test]
            fn $test() {
                $crate::intel::tests::$test::<$family>();
            }
        )*

        proptest::proptest! {
            #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

            #[test]
            fn order_and_number_are_kept(
                steps in $crate::intel::tests::steps(),
                silicon in proptest::prelude::any::<bool>(),
            ) {
                $crate::intel::tests::order_and_number_are_kept::<$family>(steps, silicon)?;
            }

            #[test]
            fn lengths_are_kept(
                steps in $crate::intel::tests::long_steps(),
                silicon in proptest::prelude::any::<bool>(),
            ) {
                $crate::intel::tests::lengths_are_kept::<$family>(steps, silicon)?;
            }
        }
    };
}
pub(crate) use tests_of_every_chip;
