use std::sync::atomic::{AtomicBool, Ordering};

use vireo_eal::handover::Fds;

use super::*;

const LEN: u64 = 1 << 16;
/// Distance between the rings.
const RING: u64 = 0x4000;

fn set_memory(backend: &mut Backend, len: u64) -> Result<Option<Vec<u64>>> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    backend.set_mem_table(&[VhostUserMemoryRegion::new(0, len, 0, 0)], vec![file], None)
}

fn set_addresses(backend: &mut Backend, at: u32, desc: u64) -> Result<()> {
    backend.set_vring_addr(at, VhostUserVringAddrFlags::empty(), desc, desc + 0x2000, desc + 0x1000, 0)
}

/// Creates a backend whose rings run.
fn running() -> (Backend, Vec<Arc<Shared>>) {
    let rings: Vec<Arc<Shared>> = (0..RINGS_PER_PAIR).map(|_| Arc::default()).collect();
    let mut backend = Backend::new(&"net_vhost0".into(), rings.clone());
    backend.set_features(Features::VERSION_1.bits()).unwrap();
    set_memory(&mut backend, LEN).unwrap();
    for at in 0..RINGS_PER_PAIR as u32 {
        backend.set_vring_num(at, 64).unwrap();
        set_addresses(&mut backend, at, u64::from(at) * RING).unwrap();
        backend.set_vring_kick(at as u8, None).unwrap();
    }
    assert!(rings.iter().all(|ring| matches!(ring.lock().slot(), Slot::Running(_))));
    (backend, rings)
}

/// The memory changes while the lcore is in a burst. The lcore then ends its ring, as it does for
/// misbehavior.
#[test]
fn an_lcore_that_ends_its_ring_unmaps_nothing() {
    let (mut backend, rings) = running();
    let old = Arc::downgrade(backend.memory.as_ref().unwrap());
    std::thread::scope(|scope| {
        let mut lcore = rings[1].own().unwrap();
        let mut state = lcore.try_lock().unwrap();
        let server = scope.spawn(|| set_memory(&mut backend, LEN));
        while !rings[1].is_wanted() {
            std::thread::yield_now();
        }
        state.put(Slot::Broken(0));
        assert!(old.upgrade().is_some(), "it is the server's to unmap");
        drop(state);
        server.join().unwrap().unwrap();
    });
    assert!(old.upgrade().is_none());
}

/// The server calls `disabled` after each request. The lcore never waits, so it would miss a burst.
#[test]
fn a_ring_that_runs_is_not_taken_to_find_disabled_ones() {
    let (backend, rings) = running();
    let mut lcores: Vec<_> = rings.iter().map(|ring| ring.own().unwrap()).collect();
    let states: Vec<_> = lcores.iter_mut().map(|lcore| lcore.try_lock().unwrap()).collect();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| backend.disabled().is_none());
        while !server.is_finished() && !rings.iter().any(|ring| ring.is_wanted()) {
            std::thread::yield_now();
        }
        let is_wanted = rings.iter().any(|ring| ring.is_wanted());
        drop(states);
        assert!(!is_wanted && server.join().unwrap());
    });
}

/// A frontend may change the eventfd of a running ring at any time. Whoever reads the link must not see it go down.
#[test]
fn the_link_stays_up_while_a_ring_is_updated() {
    let (mut backend, rings) = running();
    let is_up = rings[0].lock().is_up();
    let has_ended = AtomicBool::new(false);
    let was_down = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut was_down = false;
            while !has_ended.load(Ordering::Relaxed) {
                was_down |= !is_up.load(Ordering::Acquire);
            }
            was_down
        });
        (0..5000).for_each(|_| backend.set_vring_call(0, None).unwrap());
        has_ended.store(true, Ordering::Relaxed);
        reader.join().unwrap()
    });
    assert!(!was_down);
    backend.get_vring_base(0).unwrap();
    assert!(!is_up.load(Ordering::Acquire));
}

#[test]
fn no_ring_stays_in_memory_that_was_replaced() {
    let (mut backend, rings) = running();
    assert!(set_memory(&mut backend, 0x1000).is_err(), "the rings are beyond its end");
    assert!(rings.iter().all(|ring| matches!(ring.lock().slot(), Slot::Stopped)));
}

#[test]
fn a_ring_that_overlaps_another_is_refused_until_that_stops() {
    let (mut backend, rings) = running();
    let error = set_addresses(&mut backend, 1, 8).unwrap_err().to_string();
    assert!(error.contains("overlaps another ring"), "{error}");
    assert!(
        matches!(rings[0].lock().slot(), Slot::Running(_)) && matches!(rings[1].lock().slot(), Slot::Stopped)
    );
    backend.get_vring_base(0).unwrap();
    set_addresses(&mut backend, 1, 8).unwrap();
    assert!(matches!(rings[1].lock().slot(), Slot::Running(_)));
}

/// A used ring has 4 bytes and 8 for each of 64 descriptors. With `VIRTIO_F_EVENT_IDX` another 2 follow.
#[test]
fn without_events_a_ring_ends_before_their_words() {
    let (mut backend, rings) = running();
    let used = LEN - (4 + 64 * 8);
    let place = |backend: &mut Backend| {
        backend.set_vring_addr(0, VhostUserVringAddrFlags::empty(), 0, used, 0x1000, 0)
    };
    place(&mut backend).unwrap();
    assert!(matches!(rings[0].lock().slot(), Slot::Running(_)));
    assert!(backend.set_features((Features::VERSION_1 | Features::EVENT_IDX).bits()).is_err());
    assert!(place(&mut backend).is_err());
}

/// A successor would not know what the guest's source has to mark, or which region is about to go.
#[test]
fn a_connection_that_changes_is_not_described() {
    let why =
        |backend: &Backend| backend.record(&mut Fds::default()).err().map(|error| error.why().to_owned());
    let (mut backend, _rings) = running();
    assert_eq!(why(&backend), None);
    let log = tempfile::tempfile().unwrap();
    log.set_len(4096).unwrap();
    backend.set_log_base(&VhostUserLog { mmap_size: 4096, mmap_offset: 0 }, log).unwrap();
    assert_eq!(why(&backend).as_deref(), Some("its guest migrates"));
    backend.set_features(Features::VERSION_1.bits()).unwrap();
    assert_eq!(why(&backend), None);
    backend.remove_mem_region(&VhostUserSingleMemoryRegion::new(0, LEN, 0, 0)).unwrap();
    assert_eq!(why(&backend).as_deref(), Some("its frontend is changing its memory"));
    backend.settle();
    assert_eq!(why(&backend), None);
}
