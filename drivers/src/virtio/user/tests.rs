//! Tests of the front-end against a peer that the test plays, in raw protocol messages.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vireo_eal::dma::{DmaMemory, Part, Pool, PoolCache, Segment};
use vireo_eal::handover::Fds;
use vireo_eal::lcore::StopFlag;
use vireo_eal::mem::{Backing, Region};
use vireo_eal::{ErrorKind, Result};

use super::{Options, PEER_TIMEOUT, UserOptions};
use crate::driver::{Facts, Vdev};
use crate::handover::{HandOver, PortRecord};
use crate::port::{Nic, PortConfig, Queues};
use crate::virtio::Device;

const CONFIG: PortConfig = PortConfig::with_descriptors(64, 512);
const BUFFERS: u32 = 1024;

/// Requests ("Front-end message types").
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const GET_MAX_MEM_SLOTS: u32 = 36;
const ADD_MEM_REG: u32 = 37;

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Features that DPDK's vhost offers, and in addition MAC, STATUS, CTRL_VQ, CTRL_RX and ACCESS_PLATFORM.
const OFFERED: u64 = 1 << 33 | 1 << 32 | 1 << 30 | 1 << 29 | 1 << 18 | 1 << 17 | 1 << 16 | 1 << 15 | 1 << 5;
/// MQ, REPLY_ACK, and CONFIG, which the driver does not use.
const PROTOCOL_FEATURES: u64 = 1 | 1 << 3 | 1 << 9;
/// `VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS`.
const MEM_SLOTS: u64 = 1 << 15;

/// Behavior of the peer.
#[derive(Clone, Copy)]
struct Script {
    features: u64,
    protocol_features: u64,
    /// Closes the connection at this request.
    close_at: u32,
    /// Answers neither this request nor later ones, but keeps the connection.
    silent_at: u32,
    /// Delays each answer by [`SLOW`] from this request on.
    slow_at: u32,
    /// Answers this request with an error. `GET_VRING_BASE` has no error, so its answer carries another
    /// request's number.
    refuse: u32,
}

const HONEST: Script = Script {
    features: OFFERED,
    protocol_features: PROTOCOL_FEATURES,
    close_at: 0,
    silent_at: 0,
    slow_at: 0,
    refuse: 0,
};

/// Enough time for one answer, but not for two.
const SLOW: Duration = Duration::from_millis(1700);

type Log = Vec<(u32, Vec<u8>)>;

fn answer(stream: &mut UnixStream, request: u32, payload: &[u8]) {
    let header = [request, VERSION | REPLY, payload.len() as u32].map(u32::to_le_bytes).concat();
    // The port may have closed the connection.
    let _ = stream.write_all(&[&header, payload].concat());
}

/// Plays the peer until the connection ends; returns the requests received.
fn play(mut stream: UnixStream, script: Script) -> Log {
    let mut log = Log::new();
    let mut header = [0; 12];
    let mut slow = false;
    while stream.read_exact(&mut header).is_ok() {
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let (request, flags) = (word(0), word(4));
        let mut payload = vec![0; word(8) as usize];
        stream.read_exact(&mut payload).unwrap();
        log.push((request, payload.clone()));
        if request == script.close_at {
            break;
        }
        if request == script.silent_at {
            while stream.read(&mut [0; 64]).is_ok_and(|len| len > 0) {}
            break;
        }
        slow |= request == script.slow_at;
        if slow {
            std::thread::sleep(SLOW);
        }
        match request {
            GET_FEATURES => answer(&mut stream, request, &script.features.to_le_bytes()),
            GET_PROTOCOL_FEATURES => answer(&mut stream, request, &script.protocol_features.to_le_bytes()),
            GET_MAX_MEM_SLOTS => answer(&mut stream, request, &4_u64.to_le_bytes()),
            GET_QUEUE_NUM => answer(&mut stream, request, &2_u64.to_le_bytes()),
            GET_VRING_BASE if script.refuse == request => answer(&mut stream, GET_FEATURES, &payload),
            GET_VRING_BASE => answer(&mut stream, request, &payload),
            _ if flags & NEED_REPLY != 0 => {
                answer(&mut stream, request, &u64::from(request == script.refuse).to_le_bytes());
            }
            _ => {}
        }
    }
    log
}

/// A peer that listens on a socket in `dir`.
struct Peer {
    dir: tempfile::TempDir,
    thread: JoinHandle<Log>,
}

fn path_in(dir: &tempfile::TempDir) -> PathBuf {
    dir.path().join("socket")
}

impl Peer {
    fn new(script: Script) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(path_in(&dir)).unwrap();
        let thread = std::thread::spawn(move || play(listener.accept().unwrap().0, script));
        Self { dir, thread }
    }

    fn connect(&self) -> Result<Device> {
        connect(&path_in(&self.dir), "")
    }

    /// Returns the requests that the peer received. The port must be gone.
    fn log(self) -> Log {
        self.thread.join().unwrap()
    }
}

/// Opens a port at `path` with additional arguments `more`.
fn connect(path: &Path, more: &str) -> Result<Device> {
    Device::connect("net_virtio_user0", &options(path, more)?, &StopFlag::new())
}

fn options(path: &Path, more: &str) -> Result<UserOptions> {
    let mut args = vec![("path".to_owned(), path.to_str().unwrap().to_owned())];
    args.extend(more.split_terminator(',').map(|part| {
        let (key, value) = part.split_once('=').unwrap();
        (key.to_owned(), value.to_owned())
    }));
    UserOptions::parse("net_virtio_user0", &args)
}

fn memory() -> (Arc<DmaMemory>, PoolCache) {
    let region = Region::new(Pool::bytes(BUFFERS) + (1 << 20), Backing::SmallPages).unwrap();
    let memory = DmaMemory::map(region, &[]).unwrap();
    let cache = Pool::new(&memory, BUFFERS).unwrap().cache();
    (memory, cache)
}

fn u64_at(payload: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(payload[at..at + 8].try_into().unwrap())
}

/// Returns the payloads of all requests of one kind, in order.
fn all(log: &Log, request: u32) -> Vec<&[u8]> {
    log.iter().filter(|(code, _)| *code == request).map(|(_, payload)| &payload[..]).collect()
}

/// Another process that has taken over the connection can stop the port, and start it again. Its front-end has to learn
/// what was negotiated, and the peer sees the same answers again.
#[test]
fn a_connection_moves_to_another_process() {
    let peer = Peer::new(HONEST);
    let mut device = peer.connect().unwrap();
    let (memory, mut cache) = memory();
    let config = CONFIG.with_rx_interrupts(true);
    let (rx, tx) = device.start_pair(&config, &memory, &mut cache).unwrap();
    let queues = Queues::pair(rx, tx);
    let mut fds = Fds::default();
    let facts = device.facts(&mut fds).unwrap();
    let record = PortRecord::of(&device, &queues, &config, &mut Fds::default()).unwrap();
    let (fds, file) = (fds.duplicate().unwrap(), memory.region().fd().unwrap().try_clone_to_owned().unwrap());

    let region = memory.region();
    let region = Region::adopt(vec![file], &[(None, region.len())], region.backing()).unwrap().remove(0);
    let again = DmaMemory::map(region, &[]).unwrap();
    let pool = Pool::new(&again, BUFFERS).unwrap();
    let options = options(&path_in(&peer.dir), "").unwrap();
    let facts = Facts { record: &facts, fds: &fds };
    let mut next = options.attach("net_virtio_user0", facts).unwrap();
    let resumed = record.resume_on(&mut next, &config, &again, &mut pool.take_free(), &fds).unwrap();
    device.leave();
    drop((device, queues));
    assert!(next.link().up);
    let mut cache = pool.cache();
    next.stop(resumed, &mut cache).unwrap();
    let (rx, tx) = next.start_pair(&config, &again, &mut cache).unwrap();
    next.stop_pair(rx, tx, &mut cache).unwrap();
    drop((next, cache, fds));
    assert_eq!(pool.available(), BUFFERS);
    let log = peer.log();
    let agreed = all(&log, SET_FEATURES).into_iter().map(|payload| u64_at(payload, 0)).collect::<Vec<_>>();
    assert_eq!((agreed.len(), agreed[0]), (2, agreed[1]));
    assert_eq!(all(&log, SET_MEM_TABLE).len(), 2);
    assert_eq!(all(&log, GET_VRING_BASE).len(), 4);
}

#[test]
fn a_port_starts_stops_and_starts_again_on_one_connection() {
    let peer = Peer::new(HONEST);
    let mut device = peer.connect().unwrap();
    assert!(device.link().up);
    assert_eq!(device.mac().0[0] & 3, 2, "the peer has no address to give");
    device.set_promiscuous(true).unwrap();
    let (memory, mut cache) = memory();
    for _ in 0..3 {
        let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
        device.set_promiscuous(false).unwrap();
        device.stop_pair(rx, tx, &mut cache).unwrap();
    }
    let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
    drop(device);
    drop((rx, tx));
    let log = peer.log();

    let agreed = all(&log, SET_FEATURES).into_iter().map(|payload| u64_at(payload, 0));
    assert_eq!(agreed.collect::<Vec<_>>(), [1 << 32 | 1 << 30 | 1 << 29; 4]);
    let sizes: Vec<u64> = all(&log, SET_VRING_NUM).into_iter().map(|payload| u64_at(payload, 0)).collect();
    assert_eq!(sizes[..2], [64 << 32, 256 << 32 | 1], "queue_size bounds what the program asks for");
    let table = all(&log, SET_MEM_TABLE)[0];
    let (guest, len, user) = (u64_at(table, 8), u64_at(table, 16), u64_at(table, 24));
    assert_eq!((guest, len, u64_at(table, 32)), (user, memory.region().len() as u64, 0));
    for ring in all(&log, SET_VRING_ADDR) {
        assert!([8, 16, 24].iter().all(|at| (user..user + len).contains(&u64_at(ring, *at))));
    }
    assert_eq!(all(&log, SET_VRING_ENABLE)[..2], [&[0, 0, 0, 0, 1, 0, 0, 0], &[1, 0, 0, 0, 1, 0, 0, 0]]);
    assert_eq!(all(&log, GET_VRING_BASE).len(), 8, "also a drop stops the rings");
}

#[test]
fn buffers_are_merged_and_order_is_free_when_the_user_says_so() {
    for (more, agreed) in [("mrg_rxbuf=1", 1 << 35 | 1 << 32 | 1 << 15), ("in_order=0", 1 << 32)] {
        let peer = Peer::new(Script { features: 1 << 35 | 1 << 32 | 1 << 15, ..HONEST });
        let mut device = connect(&path_in(&peer.dir), more).unwrap();
        let (memory, mut cache) = memory();
        let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
        device.stop_pair(rx, tx, &mut cache).unwrap();
        drop(device);
        assert_eq!(u64_at(all(&peer.log(), SET_FEATURES)[0], 0), agreed, "{more}");
    }
}

#[test]
fn a_peer_without_protocol_features_is_not_asked_for_more() {
    let peer = Peer::new(Script { features: 1 << 32, ..HONEST });
    let mut device = peer.connect().unwrap();
    let (memory, mut cache) = memory();
    let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
    device.stop_pair(rx, tx, &mut cache).unwrap();
    drop(device);
    let log = peer.log();
    assert_eq!(u64_at(all(&log, SET_FEATURES)[0], 0), 1 << 32);
    assert!(all(&log, GET_PROTOCOL_FEATURES).is_empty() && all(&log, SET_VRING_ENABLE).is_empty());
}

#[test]
fn what_is_not_there_is_named_with_the_cure() {
    let dir = tempfile::tempdir().unwrap();
    let path = path_in(&dir);
    let error = connect(&path, "").unwrap_err();
    let hint = "start the vhost side first, or set server=1";
    let line = format!(
        "cannot connect net_virtio_user0 to {}: ENOENT: there is no such socket; {hint}",
        path.display()
    );
    assert_eq!((error.to_string(), error.kind()), (line, ErrorKind::Unavailable));

    drop(UnixListener::bind(&path).unwrap());
    let error = connect(&path, "").unwrap_err().to_string();
    assert!(error.contains("ECONNREFUSED: no process listens") && error.ends_with(hint), "{error}");

    let peer = Peer::new(Script { features: OFFERED & !(1 << 32), ..HONEST });
    let error = peer.connect().unwrap_err().to_string();
    assert!(error.contains("does not offer VIRTIO_F_VERSION_1"), "{error}");
}

#[test]
fn a_peer_that_goes_is_an_error_or_a_link_that_is_down() {
    let (memory, mut cache) = memory();
    let error = Peer::new(Script { close_at: GET_FEATURES, ..HONEST }).connect().unwrap_err().to_string();
    assert!(error.contains("closed the connection during GET_FEATURES"), "{error}");
    for close_at in [SET_FEATURES, SET_MEM_TABLE, SET_VRING_ADDR, SET_VRING_KICK, SET_VRING_ENABLE] {
        let mut device = Peer::new(Script { close_at, ..HONEST }).connect().unwrap();
        let error = device.start_pair(&CONFIG, &memory, &mut cache).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol);
        assert!(error.to_string().contains("the peer closed the connection during SET_"), "{error}");
        assert!(!device.link().up);
    }
    let mut device = Peer::new(Script { close_at: GET_VRING_BASE, ..HONEST }).connect().unwrap();
    let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
    device.stop_pair(rx, tx, &mut cache).unwrap();
    assert!(!device.link().up);
    let pool = Arc::clone(cache.pool());
    drop(cache);
    assert_eq!(pool.available(), BUFFERS);
}

#[test]
fn a_peer_that_refuses_is_named() {
    let (memory, mut cache) = memory();
    let mut device = Peer::new(Script { refuse: SET_MEM_TABLE, ..HONEST }).connect().unwrap();
    let error = device.start_pair(&CONFIG, &memory, &mut cache).unwrap_err().to_string();
    assert!(error.contains("the peer refuses SET_MEM_TABLE; see the peer's messages"), "{error}");
    assert!(device.link().up);
}

/// Such a peer may continue to run the rings.
#[test]
fn a_peer_that_does_not_say_that_it_stopped_keeps_the_buffers() {
    let (memory, mut cache) = memory();
    let mut device = Peer::new(Script { refuse: GET_VRING_BASE, ..HONEST }).connect().unwrap();
    let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
    device.stop_pair(rx, tx, &mut cache).unwrap_err();
    for _ in 0..3 {
        let error = device.start_pair(&CONFIG, &memory, &mut cache).unwrap_err().to_string();
        assert!(error.contains("GET_VRING_BASE"), "{error}");
    }
    let pool = Arc::clone(cache.pool());
    drop(cache);
    assert_eq!(pool.available(), BUFFERS - u32::from(CONFIG.rx_descriptors));
}

#[test]
fn a_silent_peer_is_waited_for_a_second_and_its_memory_is_kept() {
    let begin = Instant::now();
    let error = Peer::new(Script { silent_at: GET_FEATURES, ..HONEST }).connect().unwrap_err().to_string();
    assert!(error.contains("up to GET_FEATURES within 3 s"), "{error}");
    assert!(begin.elapsed() >= PEER_TIMEOUT);

    let (memory, mut cache) = memory();
    let mut device = Peer::new(Script { silent_at: GET_VRING_BASE, ..HONEST }).connect().unwrap();
    let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
    let error = device.stop_pair(rx, tx, &mut cache).unwrap_err().to_string();
    assert!(
        error.contains("GET_VRING_BASE within 3 s") && error.contains("; end the peer: the memory"),
        "{error}"
    );
    let weak = Arc::downgrade(&memory);
    drop((device, cache, memory));
    assert!(weak.upgrade().is_some());
}

/// The connection of a killed peer closes.
#[test]
fn a_silent_peer_that_goes_gives_the_memory_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = path_in(&dir);
    let listener = UnixListener::bind(&path).unwrap();
    let (goes, may_go) = std::sync::mpsc::channel::<()>();
    let peer = std::thread::spawn(move || {
        let (first, _) = listener.accept().unwrap();
        let end = first.try_clone().unwrap();
        let first = std::thread::spawn(move || play(first, Script { silent_at: GET_VRING_BASE, ..HONEST }));
        may_go.recv().unwrap();
        end.shutdown(std::net::Shutdown::Both).unwrap();
        first.join().unwrap();
        play(listener.accept().unwrap().0, HONEST)
    });
    let mut device = connect(&path, "").unwrap();
    let (memory, mut cache) = memory();
    let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
    let error = device.stop_pair(rx, tx, &mut cache).unwrap_err().to_string();
    assert!(error.contains("GET_VRING_BASE within 3 s"), "{error}");
    for _ in 0..2 {
        let error = device.start_pair(&CONFIG, &memory, &mut cache).unwrap_err().to_string();
        assert!(error.contains("its use of our memory is unknown"), "{error}");
        assert!(!device.link().up);
    }
    goes.send(()).unwrap();
    let begin = Instant::now();
    let (rx, tx) = loop {
        match device.start_pair(&CONFIG, &memory, &mut cache) {
            Ok(queues) => break queues,
            Err(error) => assert!(begin.elapsed() < Duration::from_secs(20), "{error}"),
        }
        std::thread::yield_now();
    };
    device.stop_pair(rx, tx, &mut cache).unwrap();
    drop(device);
    assert!(!all(&peer.join().unwrap(), SET_VRING_ENABLE).is_empty());
    let pool = Arc::clone(cache.pool());
    drop(cache);
    assert_eq!(pool.available(), BUFFERS);
}

#[test]
fn all_answers_of_a_start_or_a_stop_have_their_time_together() {
    let (memory, mut cache) = memory();
    let mut device = Peer::new(Script { slow_at: SET_FEATURES, ..HONEST }).connect().unwrap();
    let error = device.start_pair(&CONFIG, &memory, &mut cache).unwrap_err().to_string();
    assert!(error.contains("did not answer all requests up to SET_MEM_TABLE within 3 s"), "{error}");

    let mut device = Peer::new(Script { slow_at: GET_VRING_BASE, ..HONEST }).connect().unwrap();
    let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
    let error = device.stop_pair(rx, tx, &mut cache).unwrap_err().to_string();
    assert!(error.contains("up to GET_VRING_BASE within 3 s"), "{error}");
    for _ in 0..2 {
        let error = device.start_pair(&CONFIG, &memory, &mut cache).unwrap_err().to_string();
        assert!(error.ends_with("the memory that it mapped is kept until its connection closes"), "{error}");
    }
    let pool = Arc::clone(cache.pool());
    drop(cache);
    assert_eq!(
        pool.available(),
        BUFFERS - u32::from(CONFIG.rx_descriptors),
        "the first peer was told of no ring"
    );
}

#[test]
fn a_server_waits_for_its_peer_and_takes_a_stale_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = path_in(&dir);
    drop(UnixListener::bind(&path).unwrap());
    let peer = std::thread::spawn({
        let path = path.clone();
        move || loop {
            if let Ok(stream) = UnixStream::connect(&path) {
                return play(stream, HONEST);
            }
            std::thread::yield_now();
        }
    });
    let device = connect(&path, "server=1").unwrap();
    assert!(device.link().up);
    assert!(!path.exists(), "a second peer would wait for nothing");
    drop(device);
    assert!(!all(&peer.join().unwrap(), GET_FEATURES).is_empty());
}

#[test]
fn a_server_takes_nobody_elses_socket_and_can_be_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let path = path_in(&dir);
    let stopped = StopFlag::new();
    stopped.set();
    let error =
        Device::connect("net_virtio_user0", &options(&path, "server=1").unwrap(), &stopped).unwrap_err();
    assert!(error.to_string().ends_with("stopped before a peer connected"), "{error}");
    assert!(!path.exists());

    std::fs::write(&path, "precious").unwrap();
    let error = connect(&path, "server=1").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("not a socket") && path.exists(), "{error}");
    std::fs::remove_file(&path).unwrap();

    let _other = UnixListener::bind(&path).unwrap();
    let error = connect(&path, "server=1").unwrap_err().to_string();
    assert!(error.contains("another process listens there; use another path"), "{error}");
}

fn small() -> Region {
    Region::new(1, Backing::SmallPages).unwrap()
}

#[test]
fn memory_that_is_added_is_told_by_message_or_by_table() {
    for slots in [MEM_SLOTS, 0] {
        let script = Script { protocol_features: PROTOCOL_FEATURES | slots, ..HONEST };
        let peer = Peer::new(script);
        let mut device = peer.connect().unwrap();
        let (memory, mut cache) = memory();
        let add = || memory.memory_map().add(small(), &[Part::default()]).unwrap().swap_remove(0);
        // The next start shares this region.
        device.update_memory(&add()).unwrap();
        let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
        let added = add();
        device.update_memory(&added).unwrap();
        device.stop_pair(rx, tx, &mut cache).unwrap();
        let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
        drop(device);
        drop((rx, tx));
        let log = peer.log();
        let place = |payload: &[u8], at: usize| [0, 8, 16, 24].map(|word| u64_at(payload, at + word));
        let segments = memory.memory_map().segments();
        let row = |segment: &Arc<Segment>| {
            let iova = segment.linear_iova().unwrap();
            [iova, segment.region().len() as u64, iova, 0]
        };
        let expected: Vec<[u64; 4]> = segments.iter().map(row).collect();
        assert_eq!(expected[2][0], added.linear_iova().unwrap());
        let tables: Vec<Vec<[u64; 4]>> = all(&log, SET_MEM_TABLE)
            .into_iter()
            .map(|table| {
                assert_eq!(u64_at(table, 0), (table.len() as u64 - 8) / 32);
                (8..table.len()).step_by(32).map(|at| place(table, at)).collect()
            })
            .collect();
        let ones: Vec<[u64; 4]> = all(&log, ADD_MEM_REG).into_iter().map(|one| place(one, 8)).collect();
        match slots {
            0 => {
                assert_eq!((tables, ones), (vec![expected[..2].to_vec(), expected.clone(), expected], vec![]))
            }
            _ => assert_eq!(
                (tables, ones),
                (vec![expected[..2].to_vec(), expected.clone()], vec![expected[2]])
            ),
        }
    }
}

#[test]
fn a_peer_that_refuses_more_memory_keeps_what_it_has() {
    let script = Script { protocol_features: PROTOCOL_FEATURES | MEM_SLOTS, refuse: ADD_MEM_REG, ..HONEST };
    let peer = Peer::new(script);
    let mut device = peer.connect().unwrap();
    let (memory, mut cache) = memory();
    let (rx, tx) = device.start_pair(&CONFIG, &memory, &mut cache).unwrap();
    let added = memory.memory_map().add(small(), &[Part::default()]).unwrap().swap_remove(0);
    let error = device.update_memory(&added).unwrap_err();
    assert!(error.to_string().contains("the peer refuses ADD_MEM_REG"), "{error}");
    let add = |_| memory.memory_map().add(small(), &[Part::default()]).unwrap().swap_remove(0);
    let more = [(); 3].map(add);
    let error = device.update_memory(&more[2]).unwrap_err();
    assert!(
        error.to_string().contains("the peer maps at most 4 regions of memory, but 5 are needed"),
        "{error}"
    );
    device.check().unwrap();
    device.stop_pair(rx, tx, &mut cache).unwrap();
    drop(device);
    assert_eq!(all(&peer.log(), ADD_MEM_REG).len(), 1);
}

#[test]
fn memory_that_cannot_be_shared_is_refused() {
    let region = Region::new(Pool::bytes(BUFFERS) + (1 << 20), Backing::SmallPages).unwrap();
    let half = (region.len() / 2).next_power_of_two();
    let region = Region::new(2 * half, Backing::SmallPages).unwrap();
    let memory = DmaMemory::with_addresses(region, half, &[0x4000_0000, 0x1000_0000]);
    let mut cache = Pool::new(&memory, BUFFERS).unwrap().cache();
    let mut device = Peer::new(HONEST).connect().unwrap();
    let error = device.start_pair(&CONFIG, &memory, &mut cache).unwrap_err().to_string();
    assert!(error.contains("a port without an IOMMU makes all ports use physical addresses"), "{error}");
}

#[test]
fn arguments_are_checked() {
    let path = Path::new("/tmp/a");
    let read =
        options(path, "queues=2,queue_size=1024,mac=52:54:00:00:00:01,server=1,mrg_rxbuf=0,in_order=0")
            .unwrap();
    let expected = UserOptions {
        path: path.into(),
        queues: 2,
        queue_size: 1024,
        mac: Some("52:54:00:00:00:01".parse().unwrap()),
        server: true,
        features: Options { mrg_rxbuf: false, in_order: false },
    };
    assert_eq!(read, expected);
    let line = "cannot use queues=0 of net_virtio_user0: it is not a number from 1 to 128";
    assert_eq!(options(path, "queues=0").unwrap_err().to_string(), line);
    for wrong in ["queue_size=100", "queue_size=99999", "queue_size=0", "mac=x", "server=2", "speed=1"] {
        assert_eq!(options(path, wrong).unwrap_err().kind(), ErrorKind::Usage, "{wrong}");
    }
    for group in ["ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "00:00:00:00:00:00"] {
        let error = options(path, &format!("mac={group}")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(error.to_string().contains("which no station has"), "{error}");
    }
    let error = UserOptions::parse("virtio_user0", &[]).unwrap_err().to_string();
    assert_eq!(
        error,
        "cannot use virtio_user0: it has no socket; give the peer's: --vdev virtio_user0,path=SOCKET"
    );
}

/// The first peer has two pairs; the second lacks the protocol feature that reports the number of pairs.
#[test]
fn a_peer_that_comes_back_with_fewer_pairs_is_believed() {
    let features = 1 << 32 | 1 << 30 | 1 << 22;
    let dir = tempfile::tempdir().unwrap();
    let path = path_in(&dir);
    let listener = UnixListener::bind(&path).unwrap();
    let (goes, may_go) = std::sync::mpsc::channel::<()>();
    let peer = std::thread::spawn(move || {
        let (first, _) = listener.accept().unwrap();
        let end = first.try_clone().unwrap();
        let script = Script { features, ..HONEST };
        let first = std::thread::spawn(move || play(first, script));
        may_go.recv().unwrap();
        end.shutdown(std::net::Shutdown::Both).unwrap();
        first.join().unwrap();
        play(listener.accept().unwrap().0, Script { features: features & !(1 << 30), ..script });
    });
    let mut device = connect(&path, "queues=2").unwrap();
    let (memory, mut cache) = memory();
    let queues = device.start(&CONFIG.with_pairs(2), &memory, &mut cache).unwrap();
    goes.send(()).unwrap();
    while device.check().is_ok() {
        std::thread::yield_now();
    }
    device.stop(queues, &mut cache).unwrap();
    let error = device.start(&CONFIG.with_pairs(2), &memory, &mut cache).unwrap_err().to_string();
    assert!(error.contains("2 RX queues are requested, but it has 1"), "{error}");
    drop(device);
    peer.join().unwrap();
}

/// The peer of a client or server port goes away and comes back.
#[test]
fn a_peer_that_comes_back_is_taken_again() {
    for server in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = path_in(&dir);
        let meet = |listener: &mut Option<UnixListener>| match server {
            false => {
                let _ = std::fs::remove_file(path_in(&dir));
                let listener =
                    listener.insert(UnixListener::bind(path_in(&dir)).unwrap()).try_clone().unwrap();
                std::thread::spawn(move || listener.accept().unwrap().0)
            }
            true => {
                let path = path.clone();
                std::thread::spawn(move || {
                    loop {
                        if let Ok(stream) = UnixStream::connect(&path) {
                            return stream;
                        }
                        std::thread::yield_now();
                    }
                })
            }
        };
        let mut listener = None;
        let met = meet(&mut listener);
        let first = std::thread::spawn(move || {
            play(met.join().unwrap(), Script { close_at: SET_VRING_KICK, ..HONEST })
        });
        let mut device = connect(&path, if server { "server=1" } else { "" }).unwrap();
        let (memory, mut cache) = memory();
        device.start_pair(&CONFIG, &memory, &mut cache).unwrap_err();
        first.join().unwrap();
        drop(listener.take());
        assert_eq!(device.check().unwrap_err().kind(), ErrorKind::Unavailable);
        let error = device.start_pair(&CONFIG, &memory, &mut cache).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");

        let met = meet(&mut listener);
        let second = std::thread::spawn(move || play(met.join().unwrap(), HONEST));
        let (rx, tx) = loop {
            if let Ok(queues) = device.start_pair(&CONFIG, &memory, &mut cache) {
                break queues;
            }
            std::thread::yield_now();
        };
        device.check().unwrap();
        device.stop_pair(rx, tx, &mut cache).unwrap();
        drop(device);
        assert!(!all(&second.join().unwrap(), SET_VRING_ENABLE).is_empty());
        let pool = Arc::clone(cache.pool());
        drop(cache);
        assert_eq!(pool.available(), BUFFERS);
    }
}
