//! Pages: the hugepages of the machine and the [`Region`] that holds some of them.

mod hugepages;
mod region;

pub use hugepages::{HugePages, hugepages};
pub use region::{Backing, Region};
