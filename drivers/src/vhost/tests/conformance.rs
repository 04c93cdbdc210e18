//! Message sequences of frontends, byte by byte, with each reply checked. They follow QEMU
//! (hw/virtio/vhost-user.c, vhost.c, net/vhost-user.c), cloud-hypervisor (virtio-devices/src/vhost_user),
//! crosvm (devices/src/virtio/vhost_user_frontend) and DPDK (drivers/net/virtio/virtio_user). No frontend
//! runs here, so these tests do not notice a release that changes its sequence.

use std::io::{IoSlice, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, recv, sendmsg};
use vhost::VringConfigData;
use vmm_sys_util::eventfd::EventFd;

use super::guest::{BUFFER, BUFFERS as DATA, GUEST, Guest, MEMORY, RING, SIZE, USED, USER};
use super::*;

/// Requests (vhost-user, "Front-end message types").
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const RESET_OWNER: u32 = 4;
const SET_MEM_TABLE: u32 = 5;
const SET_LOG_BASE: u32 = 6;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_QUEUE_NUM: u32 = 17;
const SET_VRING_ENABLE: u32 = 18;
const GET_MAX_MEM_SLOTS: u32 = 36;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;

/// Flags of a message.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// `VHOST_USER_F_PROTOCOL_FEATURES`. `MQ` and the constants after it are protocol features.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// `VHOST_F_LOG_ALL`, and the same for one ring (`VHOST_VRING_F_LOG`).
const LOG_ALL: u64 = 1 << 26;
const RING_LOG: u64 = 1;
const MQ: u64 = 1 << 0;
const LOG_SHMFD: u64 = 1 << 1;
const REPLY_ACK: u64 = 1 << 3;
const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;

/// Features that the port offers.
const AGREED: u64 = ALL.bits() | PROTOCOL_FEATURES;
const OFFERED: u64 = AGREED | LOG_ALL;
const PROTOCOL_OFFERED: u64 = REPLY_ACK | CONFIGURE_MEM_SLOTS | LOG_SHMFD;

/// Whether a frontend requests an answer to a request that otherwise has none.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ack {
    No,
    Yes,
}

/// A region of the guest's memory: its index, and the number of equal regions.
#[derive(Clone, Copy)]
struct Part(u64, u64);

impl Part {
    fn words(self) -> [u64; 4] {
        let len = MEMORY / self.1;
        [GUEST + self.0 * len, len, USER + self.0 * len, self.0 * len]
    }
}

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn state(ring: usize, number: u32) -> Vec<u8> {
    bytes(&[ring as u64 | u64::from(number) << 32])
}

impl Guest {
    fn say(&mut self, request: u32, flags: u32, payload: &[u8], fds: &[RawFd]) {
        self.socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let header = [request, VERSION | flags, payload.len() as u32].map(u32::to_le_bytes).concat();
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        let parts = [IoSlice::new(&header), IoSlice::new(payload)];
        let sent = sendmsg::<()>(self.socket.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None);
        assert_eq!(sent, Ok(header.len() + payload.len()), "request {request}");
    }

    /// Returns the payload of the answer to `request`, which must have `words` 64-bit words.
    fn hear(&mut self, request: u32, words: usize) -> Vec<u64> {
        let mut header = [0; 12];
        let heard = self.socket.read_exact(&mut header);
        assert!(heard.is_ok(), "no answer to request {request}: {heard:?}");
        let expected = [request, VERSION | REPLY, 8 * words as u32].map(u32::to_le_bytes).concat();
        assert_eq!(header[..], expected[..], "header of the answer to request {request}");
        let mut payload = vec![0; 8 * words];
        self.socket.read_exact(&mut payload).unwrap();
        payload.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect()
    }

    /// Sends a request that is answered with a number; returns the number.
    fn get(&mut self, request: u32) -> u64 {
        self.say(request, 0, &[], &[]);
        self.hear(request, 1)[0]
    }

    /// Sends a request that is answered only if `ack` requests it, and then with 0.
    fn set(&mut self, request: u32, payload: &[u8], fds: &[RawFd], ack: Ack) {
        self.say(request, if ack == Ack::Yes { NEED_REPLY } else { 0 }, payload, fds);
        if ack == Ack::Yes {
            assert_eq!(self.hear(request, 1), [0], "request {request} is refused");
        }
    }

    /// Waits until all earlier requests are done, and checks that they had no further answers.
    fn settle(&mut self) {
        assert_eq!(self.get(GET_FEATURES), OFFERED);
        let more = recv(self.socket.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT);
        assert_eq!(more, Err(Errno::EAGAIN), "an answer that nobody asked for");
    }

    fn memory_fd(&self) -> RawFd {
        self.memory.region().fd().unwrap().as_raw_fd()
    }

    fn send_mem_table(&mut self, parts: &[Part], ack: Ack) {
        let fds = vec![self.memory_fd(); parts.len()];
        let mut payload = bytes(&[parts.len() as u64]);
        parts.iter().for_each(|part| payload.extend(bytes(&part.words())));
        self.set(SET_MEM_TABLE, &payload, &fds, ack);
    }

    /// Sends `ADD_MEM_REG`, which comes with a file descriptor, or `REM_MEM_REG`.
    fn change_memory(&mut self, request: u32, part: Part, ack: Ack) {
        let fds = [self.memory_fd()];
        let payload = [bytes(&[0]), bytes(&part.words())].concat();
        self.set(request, &payload, if request == ADD_MEM_REG { &fds } else { &[] }, ack);
    }

    fn send_num(&mut self, ring: usize, ack: Ack) {
        self.set(SET_VRING_NUM, &state(ring, SIZE.into()), &[], ack);
    }

    fn send_base(&mut self, ring: usize, base: u32, ack: Ack) {
        self.set(SET_VRING_BASE, &state(ring, base), &[], ack);
    }

    fn send_addr(&mut self, ring: usize, ack: Ack) {
        self.send_logged_addr(ring, false, ack);
    }

    /// Sends the addresses of a ring; its used ring is marked in the log if `is_logged` is set.
    fn send_logged_addr(&mut self, ring: usize, is_logged: bool, ack: Ack) {
        let VringConfigData { desc_table_addr, used_ring_addr, avail_ring_addr, .. } = Self::addresses(ring);
        let index = ring as u64 | if is_logged { RING_LOG << 32 } else { 0 };
        let log = if is_logged { used_ring_addr - USER + GUEST } else { 0 };
        let payload = bytes(&[index, desc_table_addr, used_ring_addr, avail_ring_addr, log]);
        self.set(SET_VRING_ADDR, &payload, &[], ack);
    }

    /// Sends a message with an eventfd: `SET_VRING_KICK`, `SET_VRING_CALL`, `SET_VRING_ERR`.
    fn send_event(&mut self, request: u32, ring: usize, ack: Ack) {
        let other = EventFd::new(0).unwrap();
        let fd = if request == SET_VRING_CALL { self.calls[ring].as_raw_fd() } else { other.as_raw_fd() };
        self.set(request, &bytes(&[ring as u64]), &[fd], ack);
    }

    fn send_enable(&mut self, ring: usize, on: bool, ack: Ack) {
        self.set(SET_VRING_ENABLE, &state(ring, on.into()), &[], ack);
    }

    fn ask_base(&mut self, ring: usize) -> u32 {
        self.say(GET_VRING_BASE, 0, &state(ring, 0), &[]);
        let answer = self.hear(GET_VRING_BASE, 1)[0];
        assert_eq!(answer as u32, ring as u32, "the answer is of another ring");
        (answer >> 32) as u32
    }

    /// Resets the rings, as a driver that is loaded again does.
    fn reboot(&mut self) {
        self.rings.iter_mut().for_each(|ring| ring.begin_at(0));
    }
}

const BOTH: [usize; 2] = [RECEIVE, TRANSMIT];

/// Passes `count` frames in each direction.
fn traffic(bench: &mut Bench, guest: &mut Guest, count: usize) {
    assert!(bench.device.link().up);
    exchange(bench, guest, count);
}

/// Opens a connection; `introduce` negotiates protocol features.
fn meet(introduce: impl FnOnce(&mut Guest)) -> (Bench, Guest) {
    let bench = Bench::new();
    let mut guest = bench.guest();
    introduce(&mut guest);
    guest.settle();
    assert!(!bench.device.link().up);
    (bench, guest)
}

/// Sends what QEMU sends when it creates the device: the rings are enabled before there is a driver.
fn qemu_makes_the_device(guest: &mut Guest, protocol: u64) {
    assert_eq!(guest.get(GET_FEATURES), OFFERED);
    assert_eq!(guest.get(GET_PROTOCOL_FEATURES), PROTOCOL_OFFERED);
    guest.set(SET_PROTOCOL_FEATURES, &bytes(&[protocol]), &[], Ack::No);
    if protocol & CONFIGURE_MEM_SLOTS != 0 {
        assert_eq!(guest.get(GET_MAX_MEM_SLOTS), 509);
    }
    guest.set(SET_OWNER, &[], &[], Ack::No);
    assert_eq!(guest.get(GET_FEATURES), OFFERED);
    for ring in BOTH {
        guest.send_event(SET_VRING_CALL, ring, Ack::No);
        guest.send_event(SET_VRING_ERR, ring, Ack::No);
    }
    let ack = if protocol & REPLY_ACK != 0 { Ack::Yes } else { Ack::No };
    BOTH.into_iter().for_each(|ring| guest.send_enable(ring, true, ack));
}

/// Sends what QEMU sends when the driver sets `DRIVER_OK`, from position `base` on.
fn qemu_starts(guest: &mut Guest, protocol: u64, base: u32, memory: &[Part]) {
    let ack = if protocol & REPLY_ACK != 0 { Ack::Yes } else { Ack::No };
    guest.set(SET_FEATURES, &bytes(&[AGREED]), &[], Ack::No);
    match protocol & CONFIGURE_MEM_SLOTS {
        0 => guest.send_mem_table(memory, ack),
        _ => memory.iter().for_each(|part| guest.change_memory(ADD_MEM_REG, *part, ack)),
    }
    for ring in BOTH {
        guest.send_num(ring, Ack::No);
        guest.send_base(ring, base, Ack::No);
        guest.send_addr(ring, Ack::No);
        guest.send_event(SET_VRING_KICK, ring, Ack::No);
        guest.send_event(SET_VRING_CALL, ring, Ack::No);
    }
    BOTH.into_iter().for_each(|ring| guest.send_enable(ring, true, ack));
    guest.settle();
}

fn qemu(protocol: u64) {
    let slots = protocol & CONFIGURE_MEM_SLOTS != 0;
    let ack = if protocol & REPLY_ACK != 0 { Ack::Yes } else { Ack::No };
    let (halves, whole) = ([Part(0, 2), Part(1, 2)], [Part(0, 1)]);
    // QEMU sends only the changed regions, or all of them.
    let again = if slots { &[][..] } else { &whole };
    let mut done = 300;
    let (mut bench, mut guest) = meet(|guest| qemu_makes_the_device(guest, protocol));
    qemu_starts(&mut guest, protocol, 0, &halves);
    traffic(&mut bench, &mut guest, 300);
    // The guest masks an interrupt and unmasks it.
    for _ in 0..2 {
        guest.send_event(SET_VRING_CALL, RECEIVE, Ack::No);
    }
    // Memory is plugged in, or two regions become one. The rings continue to run.
    if slots {
        halves.iter().for_each(|part| guest.change_memory(REM_MEM_REG, *part, ack));
        // A ring stands still for a moment while its memory changes.
        guest.settle();
        traffic(&mut bench, &mut guest, 10);
        done += 10;
        guest.change_memory(ADD_MEM_REG, whole[0], ack);
    } else {
        guest.send_mem_table(&whole, ack);
    }
    guest.settle();
    traffic(&mut bench, &mut guest, 100);
    done += 100;
    // The machine stops and continues, without disabling the rings.
    assert_eq!(BOTH.map(|ring| guest.ask_base(ring)), [done; 2]);
    assert!(!bench.device.link().up);
    qemu_starts(&mut guest, protocol, done, again);
    traffic(&mut bench, &mut guest, 100);
    // The guest restarts.
    assert_eq!(BOTH.map(|ring| guest.ask_base(ring)), [done + 100; 2]);
    guest.reboot();
    qemu_starts(&mut guest, protocol, 0, again);
    traffic(&mut bench, &mut guest, 100);
    assert_eq!(BOTH.map(|ring| guest.ask_base(ring)), [100; 2]);
    guest.settle();
    assert_eq!(bench.stop(), BUFFERS);
}

#[test]
fn conformance_qemu() {
    qemu(REPLY_ACK);
}

#[test]
fn conformance_qemu_with_memory_slots() {
    qemu(REPLY_ACK | CONFIGURE_MEM_SLOTS);
}

/// Returns the bytes of the guest's memory and, for each page, whether it is marked in the log. Clears the
/// log.
fn take_pages(guest: &Guest, log: &std::fs::File) -> (Vec<u8>, Vec<bool>) {
    use std::os::unix::fs::FileExt;
    let mut memory = vec![0; MEMORY as usize];
    guest.view.read(GUEST, &mut memory).unwrap();
    let mut bits = vec![0; log.metadata().unwrap().len() as usize];
    log.read_exact_at(&mut bits, 0).unwrap();
    log.write_all_at(&vec![0; bits.len()], 0).unwrap();
    let is_marked = |page: u64| bits[(page / 8) as usize] >> (page % 8) & 1 == 1;
    let pages = (GUEST >> 12)..(GUEST + MEMORY) >> 12;
    let elsewhere = (0..8 * bits.len() as u64).filter(|page| !pages.contains(page) && is_marked(*page));
    assert_eq!(elsewhere.count(), 0, "pages that the guest does not have");
    (memory, pages.clone().map(is_marked).collect())
}

/// The guest migrates to another machine while it runs: QEMU copies the pages that the port marks as written.
#[test]
fn conformance_qemu_migration() {
    let protocol = REPLY_ACK | LOG_SHMFD;
    let (mut bench, mut guest) = meet(|guest| qemu_makes_the_device(guest, protocol));
    qemu_starts(&mut guest, protocol, 0, &[Part(0, 2), Part(1, 2)]);
    let log = tempfile::tempfile().unwrap();
    let len = (GUEST + MEMORY) >> 15;
    log.set_len(len).unwrap();
    guest.say(SET_LOG_BASE, 0, &bytes(&[len, 0]), &[log.as_raw_fd()]);
    assert_eq!(guest.hear(SET_LOG_BASE, 2), [len, 0]);
    guest.set(SET_FEATURES, &bytes(&[AGREED | LOG_ALL]), &[], Ack::Yes);
    BOTH.into_iter().for_each(|ring| guest.send_logged_addr(ring, true, Ack::Yes));
    guest.settle();
    // A buffer of three descriptors, each with a page of its own.
    guest.provide(&[20, 30, BUFFER as u32]);
    assert_eq!((bench.send(&[frame(3)]), guest.received()), (1, vec![frame(3)]));
    let data = (DATA >> 12) as usize;
    assert_eq!(take_pages(&guest, &log).1[data..data + 4], [true, true, true, false]);
    for round in 0..20 {
        let (before, _) = take_pages(&guest, &log);
        if round % 2 == 0 {
            traffic(&mut bench, &mut guest, 1 + round);
        } else {
            // The frame spans several descriptors.
            guest.transmit_chain(&frame(round), &[HEADER, 50]);
            assert_eq!((bench.receive().len(), guest.reap_transmitted()), (1, 1));
            assert_eq!(bench.send(&[frame(round), vec![5; DATA_ROOM]]), 2);
            guest.received();
        }
        let (after, marked) = take_pages(&guest, &log);
        let changed = |page: usize| before[page << 12..][..1 << 12] != after[page << 12..][..1 << 12];
        let used = |ring: usize| ((ring as u64 * RING + USED) >> 12) as usize;
        for (page, is_marked) in marked.iter().copied().enumerate() {
            let is_the_ports = page == used(RECEIVE)
                || page == used(TRANSMIT)
                || (data..data + usize::from(SIZE) * BUFFER / (1 << 12)).contains(&page);
            assert!(!changed(page) || !is_the_ports || is_marked, "page {page} was written unmarked");
            assert!(is_the_ports || !is_marked, "page {page} is the guest's own");
        }
        assert!(marked[used(RECEIVE)] && marked[used(TRANSMIT)]);
    }
    // The migration is canceled: nothing is marked any more.
    guest.set(SET_FEATURES, &bytes(&[AGREED]), &[], Ack::Yes);
    BOTH.into_iter().for_each(|ring| guest.send_addr(ring, Ack::Yes));
    take_pages(&guest, &log);
    traffic(&mut bench, &mut guest, 100);
    assert!(take_pages(&guest, &log).1.iter().all(|marked| !marked));
    // The migration is tried again, and the machine stops here: the contents of its rings are then complete.
    guest.say(SET_LOG_BASE, 0, &bytes(&[len, 0]), &[log.as_raw_fd()]);
    guest.hear(SET_LOG_BASE, 2);
    guest.set(SET_FEATURES, &bytes(&[AGREED | LOG_ALL]), &[], Ack::Yes);
    BOTH.into_iter().for_each(|ring| guest.send_logged_addr(ring, true, Ack::Yes));
    guest.send_enable(TRANSMIT, false, Ack::Yes);
    guest.transmit(&frame(1));
    guest.await_transmitted(1);
    let base = BOTH.map(|ring| guest.ask_base(ring));
    assert!(
        take_pages(&guest, &log).1[((RING + USED) >> 12) as usize],
        "a disabled ring is drained and marked"
    );
    assert_eq!(base[RECEIVE], base[TRANSMIT] + 10);
    assert_eq!(bench.stop(), BUFFERS);
}

/// When a memory module is unplugged, its pages are unmapped once the frontend sends no more requests.
#[test]
fn conformance_memory_that_is_taken_away_is_unmapped() {
    let protocol = REPLY_ACK | CONFIGURE_MEM_SLOTS;
    let (mut bench, mut guest) = meet(|guest| qemu_makes_the_device(guest, protocol));
    qemu_starts(&mut guest, protocol, 0, &[Part(0, 1)]);
    traffic(&mut bench, &mut guest, 50);
    guest.say(REM_MEM_REG, NEED_REPLY, &[bytes(&[0]), bytes(&Part(1, 2).words())].concat(), &[]);
    assert_eq!(guest.hear(REM_MEM_REG, 1), [1], "there is no such region");
    // The port closes the connection of such a frontend, as for any request that fails.
    drop(guest);
    let mut guest = bench.guest();
    qemu_makes_the_device(&mut guest, protocol);
    qemu_starts(&mut guest, protocol, 0, &[Part(0, 1)]);
    traffic(&mut bench, &mut guest, 50);
    guest.change_memory(REM_MEM_REG, Part(0, 1), Ack::Yes);
    let begin = std::time::Instant::now();
    while bench.device.link().up {
        assert!(begin.elapsed() < Duration::from_secs(20), "the rings are still mapped");
        std::thread::yield_now();
    }
    guest.change_memory(ADD_MEM_REG, Part(0, 1), Ack::Yes);
    traffic(&mut bench, &mut guest, 50);
    assert_eq!(BOTH.map(|ring| guest.ask_base(ring)), [100; 2]);
}

#[test]
fn conformance_qemu_without_replies() {
    qemu(0);
    qemu(CONFIGURE_MEM_SLOTS);
}

fn cloud_hypervisor_starts(guest: &mut Guest, avail_idx: [u16; 2]) {
    guest.set(SET_FEATURES, &bytes(&[AGREED]), &[], Ack::Yes);
    let low: Vec<Part> = (0..5).map(|number| Part(number, 8)).collect();
    guest.send_mem_table(&low, Ack::Yes);
    BOTH.into_iter().for_each(|ring| guest.send_num(ring, Ack::Yes));
    for ring in BOTH {
        guest.send_addr(ring, Ack::Yes);
        // The driver's position, at which it may already have made buffers available.
        guest.send_base(ring, avail_idx[ring].into(), Ack::Yes);
        guest.send_event(SET_VRING_CALL, ring, Ack::Yes);
        guest.send_event(SET_VRING_KICK, ring, Ack::Yes);
    }
    BOTH.into_iter().for_each(|ring| guest.send_enable(ring, true, Ack::Yes));
    guest.settle();
}

#[test]
fn conformance_cloud_hypervisor() {
    let (mut bench, mut guest) = meet(|guest| {
        guest.set(SET_OWNER, &[], &[], Ack::No);
        assert_eq!(guest.get(GET_FEATURES), OFFERED);
        // cloud-hypervisor takes two queues for granted, and counts queues if there are more.
        assert_eq!(guest.get(GET_PROTOCOL_FEATURES), PROTOCOL_OFFERED);
        guest.set(SET_PROTOCOL_FEATURES, &bytes(&[PROTOCOL_OFFERED]), &[], Ack::No);
    });
    guest.provide_all();
    let avail = [guest.rings[RECEIVE].avail_idx, guest.rings[TRANSMIT].avail_idx];
    cloud_hypervisor_starts(&mut guest, avail);
    traffic(&mut bench, &mut guest, 200);
    // Memory is plugged in: the first message was a table, the following ones add single regions.
    guest.change_memory(ADD_MEM_REG, Part(7, 8), Ack::Yes);
    traffic(&mut bench, &mut guest, 100);
    // The machine is paused and resumed.
    BOTH.into_iter().for_each(|ring| guest.send_enable(ring, false, Ack::Yes));
    assert!(!bench.device.link().up);
    assert_eq!((bench.receive().len(), bench.send(&[frame(1)])), (0, 0));
    BOTH.into_iter().for_each(|ring| guest.send_enable(ring, true, Ack::Yes));
    traffic(&mut bench, &mut guest, 100);
    // The guest resets the device.
    BOTH.into_iter().for_each(|ring| guest.send_enable(ring, false, Ack::Yes));
    assert_eq!(BOTH.map(|ring| guest.ask_base(ring)), [400; 2]);
    guest.reboot();
    cloud_hypervisor_starts(&mut guest, [0; 2]);
    traffic(&mut bench, &mut guest, 100);
    assert_eq!(bench.stop(), BUFFERS);
}

fn crosvm_starts(guest: &mut Guest, base: [u32; 2]) {
    guest.send_mem_table(&[Part(0, 2), Part(1, 2)], Ack::No);
    for ring in BOTH {
        guest.send_num(ring, Ack::No);
        guest.send_addr(ring, Ack::No);
        guest.send_base(ring, base[ring], Ack::No);
        guest.send_event(SET_VRING_CALL, ring, Ack::No);
        guest.send_event(SET_VRING_KICK, ring, Ack::No);
        guest.send_enable(ring, true, Ack::No);
    }
    guest.settle();
}

/// Disables a ring and asks for its position, one ring after the other.
fn crosvm_stops(guest: &mut Guest) -> [u32; 2] {
    BOTH.map(|ring| {
        guest.send_enable(ring, false, Ack::No);
        guest.ask_base(ring)
    })
}

#[test]
fn conformance_crosvm() {
    let (mut bench, mut guest) = meet(|guest| {
        guest.set(SET_OWNER, &[], &[], Ack::No);
        assert_eq!(guest.get(GET_FEATURES), OFFERED);
        assert_eq!(guest.get(GET_PROTOCOL_FEATURES), PROTOCOL_OFFERED);
        guest.set(SET_PROTOCOL_FEATURES, &bytes(&[REPLY_ACK]), &[], Ack::No);
    });
    guest.set(SET_FEATURES, &bytes(&[AGREED]), &[], Ack::No);
    crosvm_starts(&mut guest, [0; 2]);
    let mut done = 0;
    for round in 0..3 {
        traffic(&mut bench, &mut guest, 150 + round);
        done += 150 + round as u32;
        // The machine sleeps and wakes.
        let base = crosvm_stops(&mut guest);
        assert_eq!(base, [done; 2]);
        assert!(!bench.device.link().up);
        crosvm_starts(&mut guest, base);
    }
    // The guest resets the device.
    assert_eq!(crosvm_stops(&mut guest), [done; 2]);
    guest.reboot();
    guest.set(SET_FEATURES, &bytes(&[AGREED]), &[], Ack::No);
    crosvm_starts(&mut guest, [0; 2]);
    traffic(&mut bench, &mut guest, 100);
    assert_eq!(bench.stop(), BUFFERS);
}

fn dpdk_starts(guest: &mut Guest, protocol: bool) {
    let features = if protocol { AGREED } else { ALL.bits() };
    BOTH.into_iter().for_each(|ring| guest.send_event(SET_VRING_CALL, ring, Ack::No));
    guest.set(SET_FEATURES, &bytes(&[features]), &[], Ack::No);
    // DPDK sends a region for each hugepage.
    let parts: Vec<Part> = (0..8).map(|number| Part(number, 8)).collect();
    guest.send_mem_table(&parts, if protocol { Ack::Yes } else { Ack::No });
    for ring in BOTH {
        guest.send_num(ring, Ack::No);
        guest.send_base(ring, 0, Ack::No);
        guest.send_addr(ring, Ack::No);
        guest.send_event(SET_VRING_KICK, ring, Ack::No);
    }
    if protocol {
        BOTH.into_iter().for_each(|ring| guest.send_enable(ring, true, Ack::No));
    }
    guest.settle();
}

#[test]
fn conformance_dpdk_virtio_user() {
    let (mut bench, mut guest) = meet(|guest| {
        guest.set(SET_OWNER, &[], &[], Ack::No);
        assert_eq!(guest.get(GET_FEATURES), OFFERED);
        assert_eq!(guest.get(GET_PROTOCOL_FEATURES), PROTOCOL_OFFERED);
        guest.set(SET_PROTOCOL_FEATURES, &bytes(&[REPLY_ACK]), &[], Ack::No);
    });
    dpdk_starts(&mut guest, true);
    traffic(&mut bench, &mut guest, 300);
    // DPDK adds memory while the port runs.
    BOTH.into_iter().for_each(|ring| guest.send_enable(ring, false, Ack::No));
    guest.send_mem_table(&[Part(0, 1)], Ack::Yes);
    BOTH.into_iter().for_each(|ring| guest.send_enable(ring, true, Ack::No));
    guest.settle();
    traffic(&mut bench, &mut guest, 100);
    // The port is stopped and started.
    BOTH.into_iter().for_each(|ring| guest.send_enable(ring, false, Ack::No));
    assert_eq!(BOTH.map(|ring| guest.ask_base(ring)), [400; 2]);
    guest.reboot();
    dpdk_starts(&mut guest, true);
    traffic(&mut bench, &mut guest, 100);
    assert_eq!(bench.stop(), BUFFERS);
}

/// DPDK before 18.05 knows no protocol features, and stops a device with `RESET_OWNER`.
#[test]
fn conformance_dpdk_virtio_user_without_protocol_features() {
    let (mut bench, mut guest) = meet(|guest| {
        guest.set(SET_OWNER, &[], &[], Ack::No);
        assert_eq!(guest.get(GET_FEATURES), OFFERED);
    });
    for _ in 0..2 {
        guest.set(SET_OWNER, &[], &[], Ack::No);
        dpdk_starts(&mut guest, false);
        traffic(&mut bench, &mut guest, 100);
        guest.set(RESET_OWNER, &[], &[], Ack::No);
        guest.settle();
        assert!(!bench.device.link().up);
        guest.reboot();
    }
    assert_eq!(bench.stop(), BUFFERS);
}

/// A port of several pairs also offers MQ and answers `GET_QUEUE_NUM`.
#[test]
fn conformance_number_of_pairs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let _device = Device::open("net_vhost0", &Options { queues: 4, ..options(&path) }).unwrap();
    let mut guest = Guest::connect(&path);
    guest.set(SET_OWNER, &[], &[], Ack::No);
    assert_eq!(guest.get(GET_FEATURES), OFFERED | Features::MQ.bits());
    assert_eq!(guest.get(GET_PROTOCOL_FEATURES), PROTOCOL_OFFERED | MQ);
    guest.set(SET_PROTOCOL_FEATURES, &bytes(&[PROTOCOL_OFFERED | MQ]), &[], Ack::No);
    assert_eq!(guest.get(GET_QUEUE_NUM), 4);
    (0..8).for_each(|ring| guest.send_num(ring, Ack::Yes));
    guest.say(SET_VRING_NUM, NEED_REPLY, &state(8, SIZE.into()), &[]);
    assert_eq!(guest.hear(SET_VRING_NUM, 1), [1], "there is no such ring");
}
