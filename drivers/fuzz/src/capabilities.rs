//! virtio function whose config space and registers come from the input.

use arbitrary::Arbitrary;
use vireo_drivers::fakedev::virtio::{Behaviour, VirtioNet};
use vireo_drivers::port::{Nic, PortConfig};
use vireo_drivers::virtio::Device;

use crate::decode;
use crate::port::{count, memory, view};

#[derive(Arbitrary, Debug)]
struct Input {
    /// Offset in config space, and the bytes to write there.
    config: Vec<(u8, Vec<u8>)>,
    features: Option<u64>,
    queue_size: Option<u16>,
    notify_off: Option<u16>,
    control_answer: Option<u8>,
    needs_reset: bool,
    refuse_features: bool,
    config_changes: bool,
    rx: u16,
    tx: u16,
}

/// Starts a virtio device with any PCI capabilities, feature bits and queue registers.
pub fn virtio_capabilities(data: &[u8]) {
    let Some(input) = decode::<Input>(data) else { return };
    let default = Behaviour::default();
    let nic = VirtioNet::new(Behaviour {
        features: input.features.unwrap_or(default.features),
        queue_size: input.queue_size.unwrap_or(default.queue_size),
        notify_off: input.notify_off,
        control_answer: input.control_answer,
        needs_reset: input.needs_reset,
        refuse_features: input.refuse_features,
        config_changes: input.config_changes,
        ..default
    });
    for (at, bytes) in &input.config {
        nic.config().set((*at).into(), bytes);
    }
    let (memory, pool) = memory();
    nic.attach(view(&memory));
    let one_line = |error: vireo_eal::Error| assert!(!error.to_string().contains('\n'));
    let mut device = match Device::probe(nic.function()) {
        Ok(device) => device,
        Err(error) => return one_line(error),
    };
    let mut cache = pool.cache();
    match device.start_pair(&PortConfig::with_descriptors(input.rx, input.tx), &memory, &mut cache) {
        Ok((rx, tx)) => match device.stop_pair(rx, tx, &mut cache) {
            Ok(()) => count(cache),
            Err(error) => one_line(error),
        },
        Err(error) => one_line(error),
    }
}
