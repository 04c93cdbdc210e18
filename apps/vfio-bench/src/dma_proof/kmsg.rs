//! What the kernel logs of a device's forbidden accesses (`Documentation/ABI/testing/dev-kmsg`).

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind as IoKind, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vireo_eal::bdf::Bdf;

/// The IOMMU reports by an interrupt, so the line comes a moment later.
const PATIENCE: Duration = Duration::from_secs(2);

/// The kernel's log from now on.
#[derive(Debug)]
pub(super) struct Kmsg(File);

impl Kmsg {
    pub(super) fn open() -> std::io::Result<Self> {
        let mut file =
            OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open("/dev/kmsg")?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self(file))
    }

    /// The next line that names the device and its page at `address`, waited for up to two seconds.
    pub(super) fn fault(&mut self, device: Bdf, address: u64) -> Option<String> {
        let deadline = Instant::now() + PATIENCE;
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(len) => {
                    let text = String::from_utf8_lossy(&record[..len]);
                    let line = text.split_once(';').map_or("", |(_, line)| line.lines().next().unwrap_or(""));
                    if names(line, device, address) {
                        return Some(line.to_owned());
                    }
                }
                // Lines that were overwritten before they were read.
                Err(error) if error.kind() == IoKind::BrokenPipe => {}
                Err(error) if error.kind() == IoKind::WouldBlock => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
                    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
                    if left.is_zero() || poll(&mut fds, timeout).is_err() {
                        return None;
                    }
                }
                Err(_) => return None,
            }
        }
    }
}

/// Whether `line` is about `device` and the page at `address`. Intel's IOMMU writes `[00:0d.0] fault addr
/// 0x7f000`, AMD's `0000:00:0d.0: ... address=0x7f000`, each with zeros in front or not.
fn names(line: &str, device: Bdf, address: u64) -> bool {
    let name = device.to_string();
    let short = name.split_once(':').map_or(name.as_str(), |(_, short)| short);
    let hex = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    let words = line.split(|c: char| !c.is_ascii_alphanumeric());
    line.contains(short) && words.filter_map(hex).any(|found| found >> 12 == address >> 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_intel_and_amd_are_known() {
        let device: Bdf = "0000:00:0d.0".parse().unwrap();
        let intel = "DMAR: [DMA Write NO_PASID] Request device [00:0d.0] fault addr 0x5a200000 [fault reason 0x05] PTE Write access is not set";
        let amd = "vfio-pci 0000:00:0d.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0010 address=0x000000005a200000 flags=0x0020]";
        for line in [intel, amd] {
            assert!(names(line, device, 0x5a20_0010), "{line}");
            assert!(!names(line, device, 0x5a20_1000), "{line}");
            assert!(!names(line, "0000:00:0e.0".parse().unwrap(), 0x5a20_0000), "{line}");
        }
    }
}
