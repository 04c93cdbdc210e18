//! The device's accesses to rings and buffers in memory.

use std::collections::{HashMap, VecDeque};

use vireo_eal::dma::{Word, full_mb};

use super::{State, feature};

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;
/// Bytes of `struct virtio_net_hdr` (5.1.6).
const HEADER: usize = 12;

/// Descriptor of a buffer that the driver made available.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
}

/// Virtqueue as the driver configured it, and the device's position in it.
#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) size: Option<u16>,
    pub(super) enabled: bool,
    /// MSI-X vector.
    pub(super) vector: Option<u16>,
    /// Addresses of the descriptor table, the avail ring and the used ring.
    pub(super) addresses: [u64; 3],
    last_avail: u16,
    /// Head of the next chain, if the driver uses descriptors in ring order.
    next_head: u16,
    /// Descriptors that were read from the avail ring and are not used yet.
    held: VecDeque<u16>,
    used: u16,
    /// Used elements by slot, as the device wrote them.
    elements: HashMap<u16, (u32, u32)>,
}

impl State {
    fn fault(&mut self, what: &'static str) {
        self.faults.push(what);
    }

    fn load<W: Word>(&mut self, address: u64) -> W {
        let word = self.view.as_ref().and_then(|view| view.load(address));
        word.unwrap_or_else(|| {
            self.fault("read of an unmapped address");
            W::default()
        })
    }

    fn store<W: Word>(&mut self, address: u64, word: W) {
        if self.view.as_ref().and_then(|view| view.store(address, word)).is_none() {
            self.fault("write to an unmapped address");
        }
    }

    fn write(&mut self, address: u64, bytes: &[u8]) {
        if self.view.as_ref().and_then(|view| view.write(address, bytes)).is_none() {
            self.fault("write to an unmapped address");
        }
    }

    fn read(&mut self, address: u64, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        if self.view.as_ref().and_then(|view| view.read(address, &mut bytes)).is_none() {
            self.fault("read of an unmapped address");
        }
        bytes
    }

    fn event_idx(&self) -> bool {
        self.driver_features & feature::EVENT_IDX != 0
    }

    fn in_order(&self) -> bool {
        self.driver_features & feature::IN_ORDER != 0
    }

    /// Index of the control queue, which follows the queue pairs (5.1.2).
    pub(super) fn control_index(&self) -> u16 {
        2 * if self.driver_features & feature::MQ != 0 { self.behaviour.pairs } else { 1 }
    }

    pub(super) fn queue(&self, index: u16) -> (&Queue, u16) {
        let queue = &self.queues[usize::from(index)];
        (queue, queue.size.unwrap_or(self.behaviour.queue_size))
    }

    /// Sets whether the driver must ring the doorbell when it makes more buffers available.
    fn want_doorbell(&mut self, index: u16, wanted: bool) {
        let (queue, size) = self.queue(index);
        let (used, last_avail) = (queue.addresses[2], queue.last_avail);
        if !queue.enabled {
            return;
        }
        if !self.event_idx() {
            self.store(used, u16::from(!wanted));
        } else if wanted {
            self.store(used + 4 + 8 * u64::from(size), last_avail);
        }
    }

    /// Takes the next available descriptor chain of a queue. Returns its head.
    fn take(&mut self, index: u16) -> Option<u16> {
        let (queue, size) = self.queue(index);
        let (enabled, avail, mut last_avail) = (queue.enabled, queue.addresses[1], queue.last_avail);
        if !enabled {
            return None;
        }
        let avail_idx: u16 = self.load(avail + 2);
        if avail_idx.wrapping_sub(last_avail) > size {
            self.fault("avail.idx runs ahead of the queue");
            return None;
        }
        while last_avail != avail_idx {
            let id: u16 = self.load(avail + 4 + 2 * u64::from(last_avail & (size - 1)));
            last_avail = last_avail.wrapping_add(1);
            if id >= size || self.queues[usize::from(index)].held.contains(&id) {
                self.fault("an offered id is beyond the queue or already offered");
            }
            self.queues[usize::from(index)].held.push_back(id);
            if self.in_order() {
                self.check_order(index, id);
            }
        }
        let out_of_order = self.behaviour.out_of_order && index.is_multiple_of(2);
        let queue = &mut self.queues[usize::from(index)];
        queue.last_avail = last_avail;
        if out_of_order { queue.held.pop_back() } else { queue.held.pop_front() }
    }

    /// Checks that each chain begins where the previous one ended in the table. `IN_ORDER` requires that, so
    /// that a device needs no avail ring (2.7.5).
    fn check_order(&mut self, index: u16, head: u16) {
        let table = self.queue(index).0.addresses[0];
        let shape: u64 = self.load(table + 16 * u64::from(head) + 8);
        let indirect = (shape >> 32) as u16 & DESC_INDIRECT != 0;
        let len = if indirect { 1 } else { self.chain(index, head).len() as u16 };
        let (queue, size) = self.queue(index);
        let wrong = queue.next_head != head;
        self.queues[usize::from(index)].next_head = head.wrapping_add(len) % size;
        if wrong {
            self.fault("a chain does not begin where the last one ended");
        }
    }

    /// Reads the descriptors of a chain.
    fn chain(&mut self, index: u16, head: u16) -> Vec<Descriptor> {
        let (queue, size) = self.queue(index);
        let (ring, mut table, mut size) = (queue.addresses[0], queue.addresses[0], size);
        let mut chain = Vec::new();
        let mut id = head;
        while chain.len() < usize::from(size) {
            let address = self.load(table + 16 * u64::from(id));
            let shape: u64 = self.load(table + 16 * u64::from(id) + 8);
            let (len, flags, next) = (shape as u32, (shape >> 32) as u16, (shape >> 48) as u16);
            if flags & DESC_INDIRECT != 0 {
                let offered = self.driver_features & feature::INDIRECT_DESC != 0;
                if !offered
                    || table != ring
                    || flags != DESC_INDIRECT
                    || !chain.is_empty()
                    || len == 0
                    || len % 16 != 0
                {
                    self.fault("a descriptor must not lead to a table, or not to this one");
                    return chain;
                }
                (table, size, id) = (address, (len / 16) as u16, 0);
                continue;
            }
            if flags & DESC_NEXT != 0 && next >= size {
                self.fault("a chain leads out of its table");
                return chain;
            }
            chain.push(Descriptor { address, len, flags });
            if flags & DESC_NEXT == 0 {
                return chain;
            }
            id = next;
        }
        self.fault("a chain loops");
        chain
    }

    /// Checks that the driver did not write the used ring, which belongs to the device (2.7.8).
    fn check_used(&mut self, index: u16) {
        let queue = &self.queues[usize::from(index)];
        let (used, elements) = (queue.addresses[2], queue.elements.clone());
        for (slot, written) in elements {
            let at = used + 4 + 8 * u64::from(slot);
            if (self.load(at), self.load(at + 4)) != written {
                self.fault("the driver wrote to the used ring");
            }
        }
    }

    /// Completes descriptors, which become visible all at once, and counts an interrupt if the driver wants
    /// one.
    pub(super) fn push_used(&mut self, index: u16, elements: &[(u32, u32)]) {
        let (queue, size) = self.queue(index);
        let ([_, avail, used], old) = (queue.addresses, queue.used);
        let one_element = self.in_order() && self.behaviour.one_element;
        let left_out = if one_element { elements.len().saturating_sub(1) } else { 0 };
        self.check_used(index);
        for (i, (id, len)) in elements[left_out..].iter().enumerate() {
            let slot = old.wrapping_add(i as u16) & (size - 1);
            let at = used + 4 + 8 * u64::from(slot);
            self.store(at, *id);
            self.store(at + 4, *len);
            self.queues[usize::from(index)].elements.insert(slot, (*id, *len));
        }
        let new = old.wrapping_add(elements.len() as u16);
        self.store(used + 2, new);
        self.queues[usize::from(index)].used = new;
        // The driver writes `used_event` and then reads `used.idx` (2.7.8.2).
        full_mb();
        let interrupt = if self.event_idx() {
            if self.load::<u16>(avail) != 0 {
                self.fault("avail.flags are not 0 with an event index");
            }
            let used_event: u16 = self.load(avail + 4 + 2 * u64::from(size));
            (0..new.wrapping_sub(old)).any(|i| old.wrapping_add(i) == used_event)
        } else {
            self.load::<u16>(avail) & 1 == 0
        };
        self.interrupts += u64::from(interrupt);
        let vector = self.queues[usize::from(index)].vector.filter(|_| interrupt);
        if let Some(event) = vector.and_then(|vector| self.vectors.get(usize::from(vector))) {
            event.signal();
        }
    }

    pub(super) fn receive(&mut self, rx: u16, frame: &[u8]) -> Option<bool> {
        let mut used = Vec::new();
        let enough = self.fill(rx, frame, &mut used)?;
        if enough {
            self.push_used(rx, &used);
        }
        Some(enough)
    }

    /// Writes `frame` to RX buffers, which are appended to `used`. Returns false if there are too few.
    pub(super) fn fill(&mut self, rx: u16, frame: &[u8], used: &mut Vec<(u32, u32)>) -> Option<bool> {
        let mergeable = self.driver_features & feature::MRG_RXBUF != 0;
        let mut bytes = vec![0; HEADER];
        bytes.extend_from_slice(frame);
        let mut taken: Vec<(u16, Descriptor)> = Vec::new();
        let mut room = 0;
        while room < bytes.len() && (mergeable || taken.is_empty()) {
            let Some(id) = self.take(rx) else { break };
            let descriptor = *self.chain(rx, id).first()?;
            if descriptor.flags != DESC_WRITE {
                self.fault("an RX descriptor is not writable, or is a chain");
            }
            room += descriptor.len as usize;
            taken.push((id, descriptor));
        }
        let enough = room >= bytes.len();
        self.want_doorbell(rx, !enough);
        if !enough {
            self.put_back(rx, taken.into_iter().map(|(id, _)| id));
            return Some(false);
        }
        let buffers = self.behaviour.num_buffers.unwrap_or(taken.len() as u16);
        bytes[HEADER - 2..HEADER].copy_from_slice(&buffers.to_le_bytes());
        if self.driver_features & feature::GUEST_CSUM != 0 {
            let (flags, start, offset) = self.behaviour.checksum;
            bytes[0] = flags;
            bytes[6..8].copy_from_slice(&start.to_le_bytes());
            bytes[8..10].copy_from_slice(&offset.to_le_bytes());
        }
        let mut rest = &bytes[..];
        for (id, descriptor) in taken {
            let (part, behind) = rest.split_at(rest.len().min(descriptor.len as usize));
            self.write(descriptor.address, part);
            used.push((u32::from(id), part.len() as u32));
            rest = behind;
        }
        Some(true)
    }

    /// Returns RX descriptors to where they were taken from.
    fn put_back(&mut self, rx: u16, ids: impl DoubleEndedIterator<Item = u16>) {
        let out_of_order = self.behaviour.out_of_order;
        let held = &mut self.queues[usize::from(rx)].held;
        for id in ids.rev() {
            if out_of_order { held.push_back(id) } else { held.push_front(id) }
        }
    }

    pub(super) fn jump_used(&mut self, index: u16, count: u16) {
        let queue = &mut self.queues[usize::from(index)];
        queue.used = queue.used.wrapping_add(count);
        let (at, used) = (queue.addresses[2] + 2, queue.used);
        self.store(at, used);
    }

    pub(super) fn transmit(&mut self, tx: u16) -> Option<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        let mut used = Vec::new();
        while let Some(id) = self.take(tx) {
            let mut bytes = Vec::new();
            for descriptor in self.chain(tx, id) {
                if descriptor.flags & DESC_WRITE != 0 {
                    self.fault("a TX descriptor is writable");
                }
                bytes.extend(self.read(descriptor.address, descriptor.len));
            }
            let frame = bytes.split_off(HEADER.min(bytes.len()));
            frames.push(self.offload(&bytes, frame));
            used.push((u32::from(id), 0));
        }
        if self.behaviour.out_of_order {
            used.reverse();
        }
        self.push_used(tx, &used);
        self.want_doorbell(tx, true);
        Some(frames)
    }

    /// Returns `frame` as it leaves the device, with the checksum that `header` requests.
    fn offload(&mut self, header: &[u8], mut frame: Vec<u8>) -> Vec<u8> {
        let mergeable = self.driver_features & feature::MRG_RXBUF != 0;
        // Without MRG_RXBUF, `num_buffers` may be what the device wrote when it received into the buffer.
        let is_blank = |fields: &[u8]| fields.iter().all(|byte| *byte == 0);
        if is_blank(&header[..HEADER - 2]) && (!mergeable || is_blank(header)) {
            return frame;
        }
        let [1, 0, 0, 0, 0, 0, s, t, o, p, 0, 0] = *header else {
            self.fault("a TX header asks for offloads that are not negotiated");
            return frame;
        };
        let start = usize::from(u16::from_le_bytes([s, t]));
        let at = start + usize::from(u16::from_le_bytes([o, p]));
        if self.driver_features & feature::CSUM == 0 || at + 2 > frame.len() {
            self.fault("a TX header asks for a checksum that is not negotiated, or beyond the frame");
            return frame;
        }
        let mut sum = 0;
        for word in frame[start..].chunks(2) {
            sum += u32::from(word[0]) << 8 | word.get(1).map_or(0, |low| u32::from(*low));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        frame[at..at + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        frame
    }

    pub(super) fn control(&mut self) {
        let Some(answer) = self.behaviour.control_answer else { return };
        let index = self.control_index();
        while let Some(id) = self.take(index) {
            let chain = self.chain(index, id);
            let [command @ .., ack] = &chain[..] else { continue };
            let bytes: Vec<u8> = command.iter().flat_map(|d| self.read(d.address, d.len)).collect();
            match bytes[..] {
                [0, 0, on] => self.promiscuous = on != 0,
                [4, 0, low, high] => self.pairs = u16::from_le_bytes([low, high]),
                _ => self.fault("unknown control command"),
            }
            self.write(ack.address, &[answer]);
            self.push_used(index, &[(u32::from(id), 1)]);
        }
    }
}
