//! vhost-user frontend whose messages, descriptors and memory come from the input. Each reply is checked.

use std::cell::RefCell;
use std::io::{IoSlice, Read};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arbitrary::Arbitrary;
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vireo_drivers::driver::Vdev;
use vireo_drivers::port::{Nic, PortConfig, RxBurst, TxBurst};
use vireo_drivers::tied::Polled;
use vireo_drivers::vhost::{Device, Options, RxQueue, TxQueue};
use vireo_eal::dma::{Burst, DATA_ROOM, DeviceView, DmaMemory, Packet, PoolCache};
use vireo_eal::mem::{Backing, Region};

use crate::port::{Poll, count, memory, view};
use crate::{Word, decode};

/// Length in bytes of the frontend's memory, and its address for descriptors and for the frontend itself.
const LEN: u64 = 64 << 10;
const BASE: u64 = 0x10_0000;
/// Number of descriptors of a ring, and the size of a ring's area: ring 1 follows ring 0.
const SIZE: u16 = 16;
const RING: u64 = 0x1000;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x800;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_LOG_BASE: u32 = 6;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_VRING_BASE: u32 = 11;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const GET_MAX_MEM_SLOTS: u32 = 36;
const SET_DEVICE_STATE_FD: u32 = 42;
const CHECK_DEVICE_STATE: u32 = 43;
/// Flags of a message: the version of the protocol, and a reply.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;

const MRG_RXBUF: u64 = 1 << 15;
const EVENT_IDX: u64 = 1 << 29;
const LOG_ALL: u64 = 1 << 26;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;
const IN_ORDER: u64 = 1 << 35;
/// Protocol features that the port offers: `LOG_SHMFD`, `REPLY_ACK` and `CONFIGURE_MEM_SLOTS`.
const PROTOCOL_OFFERED: u64 = 1 << 1 | 1 << 3 | 1 << 15;
/// Maximum number of bytes after a header.
const MOST_BYTES: u32 = 0x1000;

/// File descriptor that accompanies a message.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Fd {
    Memory,
    Event,
    Socket,
}

#[derive(Arbitrary, Debug)]
enum Payload {
    Bytes(Vec<u8>),
    Number(u64),
    State {
        index: Word,
        num: Word,
    },
    /// Offsets in the memory, of any value.
    Addresses {
        index: u8,
        desc: Word,
        used: Word,
        avail: Word,
    },
    /// Offset in the memory and in the file, and length.
    Regions(Vec<(Word, Word, Word)>),
    /// Payload of `ADD_MEM_REG` and `REM_MEM_REG`.
    Region(Word, Word, Word),
}

#[derive(Arbitrary, Debug)]
struct Message {
    request: u8,
    flags: Option<u8>,
    /// Size of the payload in the header, if it differs from the actual size. Such a message is the last one.
    size: Option<Word>,
    payload: Payload,
    fds: Vec<Fd>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Message(Message),
    Ring(Act),
}

/// Action on rings, in memory or by the lcore.
#[derive(Arbitrary, Debug)]
enum Act {
    Poll(Poll),
    /// Writes a descriptor of a ring. Its address is an offset in the memory.
    Describe {
        ring: bool,
        index: u8,
        at: Word,
        len: Word,
        flags: u8,
        next: Word,
    },
    Offer {
        ring: bool,
        head: Word,
    },
    Jump {
        ring: bool,
        count: u16,
    },
    Poke {
        at: u16,
        bytes: [u8; 8],
    },
}

impl Payload {
    fn bytes(&self) -> Vec<u8> {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        let doubles = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        let place = |offset: Word| BASE.wrapping_add(offset.get().into());
        match self {
            Self::Bytes(bytes) => bytes.clone(),
            Self::Number(number) => doubles(&[*number]),
            Self::State { index, num } => words(&[index.get(), num.get()]),
            Self::Addresses { index, desc, used, avail } => {
                [words(&[(*index).into(), 0]), doubles(&[place(*desc), place(*used), place(*avail), 0])]
                    .concat()
            }
            Self::Regions(regions) => {
                let mut bytes = words(&[regions.len() as u32, 0]);
                for (at, offset, len) in regions {
                    bytes.extend(doubles(&[place(*at), len.get().into(), place(*at), offset.get().into()]));
                }
                bytes
            }
            Self::Region(at, offset, len) => {
                doubles(&[0, place(*at), len.get().into(), place(*at), offset.get().into()])
            }
        }
    }
}

/// Port that lives as long as its thread: the frontends of all inputs connect to it one after another.
struct Port {
    socket: PathBuf,
    _dir: tempfile::TempDir,
    _device: Device,
    rx: RxQueue,
    tx: TxQueue,
    cache: PoolCache,
}

thread_local! {
    static PORT: RefCell<Option<Port>> = const { RefCell::new(None) };
}

impl Port {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory for the socket");
        let socket = dir.path().join("socket");
        let args = [("iface".to_owned(), socket.display().to_string())];
        let options = Options::parse("net_vhost0", &args).expect("a path");
        let mut device = Device::open("net_vhost0", &options).expect("a socket");
        let (memory, pool) = memory();
        let mut cache = pool.cache();
        let config = PortConfig::with_descriptors(64, 64);
        let (rx, tx) = device.start_pair(&config, &memory, &mut cache).expect("a vhost port needs nothing");
        Self { socket, _dir: dir, _device: device, rx, tx, cache }
    }

    fn poll(&mut self, poll: Poll) {
        // As a lane between vhost ports does; here both ends have the same memory.
        let addresses = Some([0x5a; 12]);
        if matches!(poll, Poll::Forward) && self.rx.pass(&mut self.tx, addresses) != Polled::Odd {
            return;
        }
        let mut burst = Burst::new();
        if let Poll::Send(count, len) = poll {
            let count = usize::from(count).min(burst.capacity());
            let packet = |packet: Packet| packet.with_len(usize::from(len) % (DATA_ROOM + 1));
            burst.extend(std::iter::from_fn(|| self.cache.allocate()).take(count).map(packet));
        } else {
            self.rx.rx_burst(&mut self.cache, &mut burst);
        }
        let mut bytes = [0; DATA_ROOM];
        for packet in &burst {
            self.cache.read(packet, 0, &mut bytes[..packet.len()]);
        }
        if !matches!(poll, Poll::Receive) {
            let before = burst.len();
            let sent = self.tx.tx_burst(&mut self.cache, &mut burst);
            assert!(sent + burst.len() == before, "a packet is sent or stays");
        }
        burst.into_iter().for_each(|packet| self.cache.free(packet));
    }
}

struct Frontend {
    socket: UnixStream,
    memory: Arc<DmaMemory>,
    view: DeviceView,
    event: EventFd,
    avail_idx: [u16; 2],
}

impl Frontend {
    fn connect(port: &Port) -> Self {
        let socket = UnixStream::connect(&port.socket).expect("the port listens");
        socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout that is not 0");
        let region = Region::new(LEN as usize, Backing::SmallPages).expect("pages of 4 KiB");
        let memory = DmaMemory::with_addresses(region, LEN as usize, &[BASE]);
        let view = view(&memory);
        let event = EventFd::new().expect("an eventfd");
        Self { socket, memory, view, event, avail_idx: [0; 2] }
    }

    /// Sends a message. Returns false if it could not be sent.
    fn send(&self, request: u32, flags: u32, size: u32, payload: &[u8], fds: &[Fd]) -> bool {
        let file = self.memory.region().fd().expect("a memfd").as_raw_fd();
        let fds: Vec<RawFd> = fds
            .iter()
            .map(|fd| match fd {
                Fd::Memory => file,
                Fd::Event => self.event.as_raw_fd(),
                Fd::Socket => self.socket.as_raw_fd(),
            })
            .collect();
        let header: Vec<u8> = [request, flags, size].iter().flat_map(|word| word.to_le_bytes()).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        let parts = [IoSlice::new(&header), IoSlice::new(payload)];
        sendmsg::<()>(self.socket.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None).is_ok()
    }

    /// Sends a message, and waits until the port has handled it. Returns false if the port has hung up.
    fn ask(&mut self, request: u32, flags: u32, payload: &[u8], fds: &[Fd]) -> bool {
        self.send(request, flags, payload.len() as u32, payload, fds)
            && self.send(GET_FEATURES, VERSION, 0, &[], &[])
            && self.answered(request, payload)
    }

    /// Reads the reply to `request`, if there is one, and the reply to the `GET_FEATURES` that was sent after
    /// it.
    fn answered(&mut self, request: u32, payload: &[u8]) -> bool {
        let (mut answers, mut refused) = (0, false);
        loop {
            let mut header = [0; 12];
            if !self.read(&mut header) {
                return false;
            }
            let [code, flags, size] = [0, 4, 8].map(|at| word(&header, at));
            assert!(flags == VERSION | REPLY && size <= MOST_BYTES, "an answer has a header: {header:?}");
            let mut body = vec![0; size as usize];
            if !self.read(&mut body) {
                return false;
            }
            let number = || {
                assert!(size == 8, "the answer to {code} has 8 bytes and not {size}");
                u64::from(word(&body, 0)) | u64::from(word(&body, 4)) << 32
            };
            if code == GET_FEATURES {
                let offered = MRG_RXBUF | LOG_ALL | EVENT_IDX | PROTOCOL_FEATURES | VERSION_1 | IN_ORDER;
                assert!(number() == offered && !refused, "a frontend whose request failed is hung up on");
                let asks = [GET_PROTOCOL_FEATURES, GET_VRING_BASE, GET_QUEUE_NUM, GET_MAX_MEM_SLOTS];
                assert!(answers == 1 || !asks.contains(&request), "a question {request} has an answer");
                return true;
            }
            answers += 1;
            assert!(code == request && answers == 1, "there is one answer, to what was asked");
            match code {
                GET_PROTOCOL_FEATURES => assert!(number() == PROTOCOL_OFFERED),
                GET_MAX_MEM_SLOTS => assert!(number() == 509),
                GET_VRING_BASE => {
                    number();
                    let position = word(&body, 4);
                    assert!(word(&body, 0) == word(payload, 0) && position <= u16::MAX.into());
                }
                // The location of the log, as it was sent.
                SET_LOG_BASE => assert!(body[..] == *payload),
                // The feature for these requests is not offered, so the reply is an error.
                SET_DEVICE_STATE_FD | CHECK_DEVICE_STATE => assert!(number() & 0xff != 0),
                _ => refused = number() != 0,
            }
        }
    }

    fn read(&mut self, bytes: &mut [u8]) -> bool {
        match self.socket.read_exact(bytes) {
            Ok(()) => true,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                panic!("the port does not answer")
            }
            Err(_) => false,
        }
    }

    /// Sets up both rings as a well-behaved driver does.
    fn set_up(&mut self, features: u64) {
        let file = Payload::Regions(vec![(Word::Small(0), Word::Small(0), Word::Any(LEN as u32))]);
        let mut good = self.ask(SET_OWNER, VERSION, &[], &[])
            && self.ask(SET_FEATURES, VERSION, &(VERSION_1 | features).to_le_bytes(), &[])
            && self.ask(SET_MEM_TABLE, VERSION, &file.bytes(), &[Fd::Memory]);
        for index in 0..2_u8 {
            let at = |part: u64| Word::Any((u64::from(index) * RING + part) as u32);
            let addresses = Payload::Addresses { index, desc: at(0), used: at(USED), avail: at(AVAIL) };
            let num = Payload::State { index: Word::Small(index), num: Word::Medium(SIZE) };
            good = good
                && self.ask(SET_VRING_NUM, VERSION, &num.bytes(), &[])
                && self.ask(SET_VRING_ADDR, VERSION, &addresses.bytes(), &[])
                && self.ask(SET_VRING_CALL, VERSION, &u64::from(index).to_le_bytes(), &[Fd::Event])
                && self.ask(SET_VRING_KICK, VERSION, &u64::from(index).to_le_bytes(), &[Fd::Event]);
        }
        assert!(good, "an honest frontend is served");
    }

    /// Sends a message. Returns false if it was the last one.
    fn message(&mut self, message: &Message) -> bool {
        // `GET_FEATURES` is reserved: its reply shows that the port has handled the previous messages.
        let request = u32::from(message.request).max(GET_FEATURES + 1);
        let flags = message.flags.map_or(VERSION, u32::from);
        let payload = message.payload.bytes();
        match message.size {
            None => self.ask(request, flags, &payload, &message.fds),
            Some(size) => {
                self.send(request, flags, size.get(), &payload, &message.fds);
                false
            }
        }
    }

    fn act(&mut self, act: &Act, port: &mut Port) {
        let ring_at = |ring: bool, part: u64| BASE + u64::from(ring) * RING + part;
        match *act {
            Act::Poll(poll) => port.poll(poll),
            Act::Describe { ring, index, at, len, flags, next } => {
                let entry = ring_at(ring, u64::from(index % SIZE as u8) * 16);
                let shape = u64::from(len.get()) | u64::from(flags) << 32 | u64::from(next.get()) << 48;
                self.view.store(entry, BASE.wrapping_add(at.get().into())).expect("in memory");
                self.view.store(entry + 8, shape).expect("in memory");
            }
            Act::Offer { ring, head } => {
                let position = &mut self.avail_idx[usize::from(ring)];
                let slot = ring_at(ring, AVAIL + 4 + 2 * u64::from(*position % SIZE));
                *position = position.wrapping_add(1);
                self.view.store(slot, head.get() as u16).expect("in memory");
                self.view.store(ring_at(ring, AVAIL + 2), *position).expect("in memory");
            }
            Act::Jump { ring, count } => {
                let position = &mut self.avail_idx[usize::from(ring)];
                *position = position.wrapping_add(count);
                self.view.store(ring_at(ring, AVAIL + 2), *position).expect("in memory");
            }
            Act::Poke { at, bytes } => {
                let at = u64::from(at).min(LEN - bytes.len() as u64);
                self.view.write(BASE + at, &bytes).expect("in memory");
            }
        }
    }

    /// Hangs up, and waits until the port has noticed.
    fn end(mut self) {
        let _ = self.socket.shutdown(Shutdown::Write);
        let mut rest = [0; 256];
        while self.socket.read(&mut rest).is_ok_and(|len| len > 0) {}
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[at + i]))
}

fn with_port(run: impl FnOnce(&mut Port)) {
    PORT.with_borrow_mut(|port| {
        let port = port.get_or_insert_with(Port::new);
        run(port);
        let cache = port.cache.pool().cache();
        count(std::mem::replace(&mut port.cache, cache));
    });
}

/// Sends messages of any kind in any order, while the lcore works.
pub fn vhost_messages(data: &[u8]) {
    let Some((honest, steps)) = decode::<(bool, Vec<Step>)>(data) else { return };
    with_port(|port| {
        let mut frontend = Frontend::connect(port);
        if honest {
            frontend.set_up(MRG_RXBUF);
        }
        for step in &steps {
            match step {
                Step::Message(message) if !frontend.message(message) => break,
                Step::Message(_) => {}
                Step::Ring(act) => frontend.act(act, port),
            }
        }
        frontend.end();
    });
}

/// Writes any descriptors, rings and memory, after a valid setup by the frontend.
pub fn vhost_rings(data: &[u8]) {
    let Some((mergeable, event_idx, acts)) = decode::<(bool, bool, Vec<Act>)>(data) else { return };
    with_port(|port| {
        let mut frontend = Frontend::connect(port);
        frontend.set_up((u64::from(mergeable) * MRG_RXBUF) | (u64::from(event_idx) * EVENT_IDX));
        acts.iter().for_each(|act| frontend.act(act, port));
        frontend.end();
    });
}
