//! Functions that the fuzz targets run. Each one accepts any bytes, and panics if Vireo breaks a guarantee on
//! them. `tests/corpus.rs` runs them on the committed corpus with any Rust toolchain.
#![forbid(unsafe_code)]

mod arguments;
mod capabilities;
mod intel;
mod port;
mod vhost;
mod virtio;

use arbitrary::{Arbitrary, Unstructured};

pub use arguments::{device_arguments, eal_arguments};
pub use capabilities::virtio_capabilities;
pub use intel::{e1000_rings, igb_rings};
pub use vhost::{vhost_messages, vhost_rings};
pub use virtio::virtio_rings;

/// Parses the results of VFIO ioctls that return a chain of capabilities.
pub fn vfio_info(data: &[u8]) {
    vireo_eal::vfio::read_info(data);
}

/// Function that runs an input.
pub type Target = fn(&[u8]);

/// All targets, by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("device_arguments", device_arguments),
    ("e1000_rings", e1000_rings),
    ("eal_arguments", eal_arguments),
    ("igb_rings", igb_rings),
    ("vfio_info", vfio_info),
    ("vhost_messages", vhost_messages),
    ("vhost_rings", vhost_rings),
    ("virtio_capabilities", virtio_capabilities),
    ("virtio_rings", virtio_rings),
];

/// Decodes a value from `data`, or returns `None` if `data` is too short.
fn decode<T: for<'a> Arbitrary<'a>>(data: &[u8]) -> Option<T> {
    T::arbitrary_take_rest(Unstructured::new(data)).ok()
}

/// A word of any value, but often in the range of valid ones.
#[derive(Arbitrary, Debug, Clone, Copy)]
enum Word {
    Small(u8),
    Medium(u16),
    Any(u32),
}

impl Word {
    fn get(self) -> u32 {
        match self {
            Self::Small(value) => value.into(),
            Self::Medium(value) => value.into(),
            Self::Any(value) => value,
        }
    }
}
