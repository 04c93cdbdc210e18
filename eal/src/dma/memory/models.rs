//! Models of concurrent allocation, for loom.

use super::*;
use crate::mem::Backing;
use crate::sync::{model, thread};

#[test]
fn no_byte_is_given_out_twice() {
    model(None, || {
        let region = Region::new(4 * 4096, Backing::SmallPages).unwrap();
        let memory = DmaMemory::map(region, &[]).unwrap();
        let ring = |memory: &DmaMemory| (memory.allocate(5000, 64, Access::ReadWrite).unwrap(), 5000);
        let buffers =
            |memory: &DmaMemory| (memory.allocate_buffers(2, 2048, Access::Read).unwrap(), 2 * 2048);
        let others = [Arc::clone(&memory), Arc::clone(&memory)];
        let [first, second] = others;
        let others = [thread::spawn(move || ring(&first)), thread::spawn(move || buffers(&second))];
        let mut taken = vec![(memory.allocate(100, 8, Access::Write).unwrap(), 100)];
        taken.extend(others.map(|other| other.join().unwrap()));
        taken.sort_unstable();
        assert!(taken.windows(2).all(|two| two[0].0 + two[0].1 <= two[1].0), "{taken:?} overlap");
    });
}

#[test]
fn the_last_bytes_go_to_one() {
    model(None, || {
        let memory = DmaMemory::map(Region::new(4096, Backing::SmallPages).unwrap(), &[]).unwrap();
        let other = Arc::clone(&memory);
        let other = thread::spawn(move || other.allocate(4096, 8, Access::ReadWrite).is_ok());
        let own = memory.allocate_buffers(2, 2048, Access::ReadWrite).is_ok();
        assert!(own != other.join().unwrap());
    });
}
