//! Tests of frontends that misbehave.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;
use vhost::VhostBackend;

use super::guest::{GUEST, MEMORY, USER};
use super::*;

/// Descriptors of a chain that begins at descriptor 0: address, length, flags, next.
pub(super) type Table = &'static [(u64, u32, u16, u16)];

const INDIRECT: u16 = 4;

/// Chains that no frontend may offer. `DESC_WRITE` is toggled for the ring that receives.
pub(super) const LIES: &[(Table, &str)] = &[
    (&[(GUEST + MEMORY - 50, 100, 0, 0)], "beyond the end"),
    (&[(GUEST - 1, 100, 0, 0)], "before the begin"),
    (&[(u64::MAX - 5, 100, 0, 0)], "around the end of addresses"),
    (&[(USER, 100, 0, 0)], "by user address"),
    (&[(GUEST, u32::MAX, 0, 0)], "too long"),
    (&[(GUEST, 100, DESC_WRITE, 0)], "wrong direction"),
    (&[(GUEST, 100, INDIRECT, 0)], "indirect"),
    (&[(GUEST, 0, DESC_NEXT, 1), (GUEST, 0, DESC_NEXT, 0)], "loop"),
    (&[(GUEST, 5, DESC_NEXT, SIZE)], "next beyond the table"),
    (&[(GUEST, 5, DESC_NEXT, 1), (GUEST + MEMORY, 100, 0, 0)], "second outside"),
    (&[(GUEST, 5, DESC_NEXT, 1), (GUEST, 100, DESC_WRITE, 0)], "second of the wrong direction"),
];

/// Offers a valid chain, then an invalid one.
pub(super) fn offer_lie(guest: &mut Guest, ring: usize, table: Table) {
    for (i, (address, len, flags, next)) in table.iter().enumerate() {
        let flags = if ring == RECEIVE { flags ^ DESC_WRITE } else { *flags };
        guest.rings[ring].describe(i as u16, *address, *len, flags, *next);
    }
    let flags = if ring == RECEIVE { DESC_WRITE } else { 0 };
    guest.rings[ring].describe(SIZE - 1, guest.rings[ring].buffer(SIZE - 1), 1500, flags, 0);
    guest.rings[ring].offer(SIZE - 1);
    guest.rings[ring].offer(0);
}

/// Checks that the invalid chain has stopped the ring, that the other ring works, and that a new start
/// repairs it.
fn check_stopped(mut bench: Bench, mut guest: Guest, ring: usize, why: &str) {
    let errors =
        |bench: &Bench| [bench.tx.counters().device_errors.get(), bench.rx.counters().device_errors.get()];
    let mut expected = [0, 0];
    expected[ring] = 1;
    assert_eq!(errors(&bench), expected, "{why}");
    assert!(!bench.device.link().up);
    bench.receive();
    bench.send(&[frame(1)]);
    guest.set_mem_table();
    guest.enable(ring, true);
    assert!(!bench.device.link().up, "{why}: broken until it is started anew");
    guest.stop();
    [RECEIVE, TRANSMIT].into_iter().for_each(|ring| guest.start_ring(ring));
    exchange(&mut bench, &mut guest, 100);
    assert_eq!(errors(&bench), expected, "{why}");
    assert_eq!(bench.stop(), BUFFERS, "{why}");
}

#[test]
fn a_bad_chain_stops_the_ring_that_transmits() {
    for (table, why) in LIES {
        let (mut bench, mut guest) = Bench::with(ALL);
        offer_lie(&mut guest, TRANSMIT, table);
        assert_eq!(bench.receive().len(), 1, "{why}: what was good comes");
        assert_eq!(guest.reap_transmitted(), 1);
        check_stopped(bench, guest, TRANSMIT, why);
    }
}

#[test]
fn a_bad_chain_stops_the_ring_that_receives() {
    for (table, why) in LIES {
        let (mut bench, mut guest) = Bench::with(PLAIN);
        offer_lie(&mut guest, RECEIVE, table);
        assert_eq!(bench.send(&[frame(1), frame(2)]), 1, "{why}: what was good goes");
        check_stopped(bench, guest, RECEIVE, why);
    }
}

/// Builds one chain of `count` descriptors of `len` bytes, and offers it in every slot.
fn offer_one_chain_everywhere(guest: &mut Guest, ring: usize, count: u16, len: u32) {
    let write = if ring == RECEIVE { DESC_WRITE } else { 0 };
    for i in 0..count {
        let next = if i + 1 < count { DESC_NEXT } else { 0 };
        guest.rings[ring].describe(i, guest.rings[ring].buffer(i), len, write | next, i + 1);
    }
    (0..SIZE).for_each(|_| guest.rings[ring].offer(0));
}

#[test]
fn chains_that_share_descriptors_stop_the_ring() {
    let (mut bench, mut guest) = Bench::with(ALL);
    offer_one_chain_everywhere(&mut guest, TRANSMIT, 8, 40);
    assert_eq!(bench.receive().len(), usize::from(SIZE) / 8, "as many as the table can hold");
    check_stopped(bench, guest, TRANSMIT, "shared");
    for (features, count) in [(ALL, SIZE), (ALL, SIZE / 4), (PLAIN, SIZE)] {
        let (mut bench, mut guest) = Bench::with(features);
        let len = if features == ALL { 0 } else { 5 };
        offer_one_chain_everywhere(&mut guest, RECEIVE, count, len);
        bench.send(&vec![vec![1; 5 * usize::from(SIZE) - HEADER]; MAX_BURST]);
        check_stopped(bench, guest, RECEIVE, "shared");
    }
}

/// Each such buffer makes the lcore visit every region.
#[test]
fn buffers_over_many_regions_stop_the_ring() {
    for ring in [RECEIVE, TRANSMIT] {
        let bench = Bench::new();
        let mut guest = bench.guest();
        guest.regions = 8;
        guest.start(PLAIN);
        let mut bench = bench;
        let write = if ring == RECEIVE { DESC_WRITE } else { 0 };
        guest.rings[ring].describe(0, GUEST, MEMORY as u32, write, 0);
        (0..SIZE).for_each(|_| guest.rings[ring].offer(0));
        while bench.device.link().up {
            bench.receive();
            bench.send(&vec![frame(1); MAX_BURST]);
        }
        guest.regions = 1;
        check_stopped(bench, guest, ring, "borders");
    }
}

#[test]
fn an_index_that_jumps_stops_the_ring() {
    for jump in [SIZE + 1, 1000, u16::MAX] {
        let (mut bench, mut guest) = Bench::with(ALL);
        guest.rings[TRANSMIT].avail_idx = jump;
        guest.rings[TRANSMIT].publish();
        assert!(bench.receive().is_empty());
        check_stopped(bench, guest, TRANSMIT, "avail.idx");
    }
    let (mut bench, mut guest) = Bench::with(ALL);
    guest.rings[RECEIVE].avail_idx = SIZE + 1;
    guest.rings[RECEIVE].publish();
    assert_eq!(bench.send(&[frame(0)]), 0);
    check_stopped(bench, guest, RECEIVE, "avail.idx");
}

#[test]
fn a_head_beyond_the_table_and_a_short_header_stop_the_ring() {
    let (mut bench, mut guest) = Bench::with(ALL);
    guest.rings[TRANSMIT].offer(SIZE);
    assert!(bench.receive().is_empty());
    check_stopped(bench, guest, TRANSMIT, "head");
    let (mut bench, mut guest) = Bench::with(ALL);
    guest.rings[TRANSMIT].describe(0, GUEST, HEADER as u32 - 1, 0, 0);
    guest.rings[TRANSMIT].offer(0);
    assert!(bench.receive().is_empty());
    check_stopped(bench, guest, TRANSMIT, "header");
}

#[test]
fn requests_that_make_no_sense_end_the_connection_only() {
    type Request = fn(&mut Guest) -> bool;
    let requests: [Request; 8] = [
        |guest| guest.frontend.set_vring_num(TRANSMIT, 3).is_err(),
        |guest| guest.frontend.set_vring_num(TRANSMIT, 0).is_err(),
        |guest| guest.frontend.set_features(1 << 40).is_err(),
        |guest| {
            let mut at = Guest::addresses(TRANSMIT);
            at.used_ring_addr = USER + MEMORY - 16;
            guest.frontend.set_vring_addr(TRANSMIT, &at).is_err()
        },
        |guest| {
            let mut at = Guest::addresses(TRANSMIT);
            at.desc_table_addr = u64::MAX - 15;
            guest.frontend.set_vring_addr(TRANSMIT, &at).is_err()
        },
        |guest| {
            let mut at = Guest::addresses(TRANSMIT);
            at.avail_ring_addr = GUEST;
            guest.frontend.set_vring_addr(TRANSMIT, &at).is_err()
        },
        |guest| guest.frontend.set_log_base(0, None).is_err() || guest.is_disconnected(),
        |guest| {
            let socket = UnixStream::pair().unwrap().0;
            let region = vhost::VhostUserMemoryRegionInfo {
                guest_phys_addr: 0,
                memory_size: 4096,
                userspace_addr: 0,
                mmap_offset: 0,
                mmap_handle: socket.as_raw_fd(),
            };
            guest.frontend.set_mem_table(&[region]).is_err()
        },
    ];
    for (number, request) in requests.iter().enumerate() {
        let (mut bench, mut guest) = Bench::with(ALL);
        assert!(request(&mut guest), "request {number}");
        assert!(guest.is_disconnected(), "request {number}");
        let mut guest = bench.guest();
        guest.start(ALL);
        exchange(&mut bench, &mut guest, 10);
        assert_eq!(bench.stop(), BUFFERS);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Descriptor tables and avail rings have arbitrary contents, close to valid ones and far from them.
    #[test]
    fn no_ring_panics_or_loses_a_buffer(
        tables in proptest::collection::vec(
            (prop_oneof![GUEST - 100..GUEST + MEMORY + 100, any::<u64>()],
             prop_oneof![0_u32..3000, any::<u32>()], 0_u16..8, 0..SIZE + 2),
            2 * usize::from(SIZE),
        ),
        heads in proptest::collection::vec(0..SIZE + 1, 1..80),
        mergeable: bool,
    ) {
        let (mut bench, mut guest) = Bench::with(if mergeable { ALL } else { PLAIN });
        for ring in [RECEIVE, TRANSMIT] {
            for (i, (address, len, flags, next)) in tables[ring * usize::from(SIZE)..][..usize::from(SIZE)].iter().enumerate() {
                // Frames may be written into the rings themselves, whose contents are then arbitrary too.
                guest.rings[ring].describe(i as u16, *address, *len, *flags, *next);
            }
        }
        for head in heads {
            guest.rings[RECEIVE].offer(head);
            guest.rings[TRANSMIT].offer(head);
            bench.receive();
            bench.send(&[frame(1), frame(30)]);
        }
        prop_assert_eq!(bench.stop(), BUFFERS);
    }
}

#[test]
fn a_frontend_that_hangs_in_a_message_does_not_keep_the_port() {
    let bench = Bench::new();
    let mut half = UnixStream::connect(bench.dir.path().join("socket")).unwrap();
    std::io::Write::write_all(&mut half, &[1, 0, 0, 0, 1]).unwrap();
    drop(bench.device);
    let mut rest = Vec::new();
    let ended = std::io::Read::read_to_end(&mut half, &mut rest);
    assert!(ended.is_err() || rest.is_empty());
}
