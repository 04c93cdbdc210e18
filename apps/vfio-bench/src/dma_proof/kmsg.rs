//! Finds the kernel's reports of a device's forbidden accesses (`Documentation/ABI/testing/dev-kmsg`).

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind as IoKind, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vireo_eal::bdf::Bdf;

/// Longest wait for a report. The IOMMU reports by interrupt, so the line is logged a moment after the
/// access.
const PATIENCE: Duration = Duration::from_secs(2);

/// The lines of the kernel log since it was opened.
#[derive(Debug)]
pub(super) struct Kmsg(File);

impl Kmsg {
    pub(super) fn open() -> std::io::Result<Self> {
        let mut file =
            OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open("/dev/kmsg")?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self(file))
    }

    /// Waits up to two seconds for the next report of an access by `device` to the page at `address`.
    pub(super) fn fault(&mut self, device: Bdf, address: u64) -> Option<String> {
        let deadline = Instant::now() + PATIENCE;
        let mut reports = Reports { device, page: address >> 12, event: None };
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(len) => {
                    let text = String::from_utf8_lossy(&record[..len]);
                    let line = text.split_once(';').map_or("", |(_, line)| line.lines().next().unwrap_or(""));
                    if let Some(report) = reports.read(line) {
                        return Some(report);
                    }
                }
                // Lines were overwritten before they were read.
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

/// Finds the report of one device's access to one page in the lines of the log.
#[derive(Debug)]
struct Reports {
    device: Bdf,
    /// Page number: the address in units of 4 KiB.
    page: u64,
    /// The part of an SMMUv3 event that was read so far.
    event: Option<Event>,
}

/// Event record of an SMMUv3. The kernel prints it raw: a header line, and one line for each of its four
/// words (`arm_smmu_dump_raw_event`). Before Linux 6.15 it prints nothing else.
#[derive(Debug)]
struct Event {
    /// Name of the SMMU with a colon, with which each line begins.
    smmu: String,
    text: String,
    words: Vec<u64>,
}

impl Reports {
    /// Returns the whole report if `line` is its last line.
    fn read(&mut self, line: &str) -> Option<String> {
        if let Some(begun) = Event::begin(line) {
            self.event = Some(begun);
            return None;
        }
        if !self.event.as_mut().is_some_and(|event| event.add(line)) {
            return self.is_report(line).then(|| line.to_owned());
        }
        let event = self.event.take_if(|event| event.words.len() == Event::WORDS)?;
        event.is_fault(self.device, self.page).then_some(event.text)
    }

    /// Returns whether `line` alone is a complete report. VT-d (`dmar_fault_do_one`) writes `Request device
    /// [00:0d.0] fault addr 0x5a200000`. AMD's driver (`amd_iommu_report_page_fault`) writes `0000:00:0d.0: …
    /// address=0x5a200000`, or `device=00:0d.0 … address=0x…` for an unknown device. The SMMUv3 driver
    /// (`arm_smmu_dump_event`, Linux 6.15) writes `client: 0000:00:0d.0 … iova: 0x5a200000`.
    fn is_report(&self, line: &str) -> bool {
        let name = self.device.to_string();
        let short = name.split_once(':').map_or(name.as_str(), |(_, short)| short);
        let mut words = line.split(|c: char| !c.is_ascii_alphanumeric() && c != ':' && c != '.');
        let is_device = words.any(|word| [name.as_str(), short].contains(&word.trim_end_matches(':')));
        let address = ["fault addr ", "address=", "iova: "].iter().find_map(|key| {
            let (_, rest) = line.split_once(key)?;
            let rest = rest.strip_prefix("0x").unwrap_or(rest);
            let end = rest.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(rest.len());
            u64::from_str_radix(&rest[..end], 16).ok()
        });
        is_device && address.is_some_and(|address| address >> 12 == self.page)
    }
}

impl Event {
    /// The kernel's `EVTQ_ENT_DWORDS`.
    const WORDS: usize = 4;

    fn begin(line: &str) -> Option<Self> {
        let (smmu, number) = line.strip_suffix(" received:")?.rsplit_once(" event 0x")?;
        u8::from_str_radix(number, 16).ok()?;
        Some(Self { smmu: smmu.to_owned(), text: line.to_owned(), words: Vec::new() })
    }

    /// Takes the word of `line` if the line belongs to this event.
    fn add(&mut self, line: &str) -> bool {
        let word = line.strip_prefix(self.smmu.as_str()).and_then(|rest| {
            // `/dev/kmsg` escapes the tab before the word as `\x09`.
            let rest = rest.trim_start();
            let word = rest.strip_prefix("\\x09").unwrap_or(rest).strip_prefix("0x")?;
            u64::from_str_radix(word, 16).ok().map(|value| (word, value))
        });
        if let Some((word, value)) = word {
            self.text += &format!(" 0x{word}");
            self.words.push(value);
        }
        word.is_some()
    }

    /// Returns whether the event is F_TRANSLATION, F_ADDR_SIZE, F_ACCESS or F_PERMISSION of an access by
    /// `device` to `page` (Arm SMMUv3 architecture, IHI 0070, 7.3). On PCIe the low 16 bits of a StreamID are
    /// the requester ID.
    fn is_fault(&self, device: Bdf, page: u64) -> bool {
        let requester =
            u64::from(device.bus()) << 8 | u64::from(device.device()) << 3 | u64::from(device.function());
        let [first, _, address, _] = self.words[..] else { return false };
        (0x10..=0x13).contains(&(first & 0xff)) && first >> 32 & 0xffff == requester && address >> 12 == page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the report found in `lines` for a device and an address.
    fn find(lines: &[&str], device: &str, address: u64) -> Option<String> {
        let mut reports = Reports { device: device.parse().unwrap(), page: address >> 12, event: None };
        lines.iter().find_map(|line| reports.read(line))
    }

    #[test]
    fn lines_that_say_it_all_are_known() {
        for (line, device, address) in [
            (
                "DMAR: [DMA Write NO_PASID] Request device [00:0d.0] fault addr 0x5a200000 [fault reason 0x05] PTE Write access is not set",
                "0000:00:0d.0",
                0x5a20_0000,
            ),
            ("DMAR:[DMA Write] Request device [00:02.0] fault addr 6df084000", "0000:00:02.0", 0x6_df08_4000),
            (
                "vfio-pci 0000:04:10.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0037 address=0x7b657064 flags=0x0000]",
                "0000:04:10.0",
                0x7b65_7000,
            ),
            (
                "AMD-Vi: Event logged [IO_PAGE_FAULT device=0a:00.0 domain=0x001d address=0x000000000637c000 flags=0x0000]",
                "0000:0a:00.0",
                0x637_c010,
            ),
            (
                "arm-smmu-v3 arm-smmu-v3.0.auto: event: F_TRANSLATION client: 0000:00:0d.0 sid: 0x68 ssid: 0 iova: 0x5a200000 ipa: 0x0",
                "0000:00:0d.0",
                0x5a20_0000,
            ),
        ] {
            assert_eq!(find(&[line], device, address).as_deref(), Some(line));
            assert_eq!(find(&[line], device, address + 0x1000), None, "{line}");
            assert_eq!(find(&[line], "0000:00:0e.0", address), None, "{line}");
        }
        // A device in another PCI domain does not match, nor does another number on the line.
        let line = "vfio-pci 0001:04:10.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0037 address=0x7b657064 flags=0x0000]";
        assert_eq!(find(&[line], "0000:04:10.0", 0x7b65_7000), None);
        assert_eq!(find(&[line], "0001:04:10.0", 0), None);
    }

    #[test]
    fn events_of_an_smmu_are_known() {
        // Lines as `/dev/kmsg` has them, interleaved with an unrelated line and one of another SMMU.
        let event = |id: &str, sid: &str| {
            [
                format!("arm-smmu-v3 arm-smmu-v3.0.auto: event 0x{id} received:"),
                format!("arm-smmu-v3 arm-smmu-v3.0.auto: \\x090x{sid}000000{id}"),
                "e1000e 0000:00:0c.0 eth0: NIC Link is Up".to_owned(),
                "arm-smmu-v3 arm-smmu-v3.0.auto: \\x090x0000020000000000".to_owned(),
                "arm-smmu-v3 arm-smmu-v3.1.auto: \\x090x0000000000001000".to_owned(),
                "arm-smmu-v3 arm-smmu-v3.0.auto: \\x090x000000005a200040".to_owned(),
                "arm-smmu-v3 arm-smmu-v3.0.auto: \\x090x0000000000000000".to_owned(),
            ]
        };
        let found = |lines: &[String], device, address| {
            find(&lines.iter().map(String::as_str).collect::<Vec<_>>(), device, address)
        };
        let nic = "0000:00:0d.0";
        for id in ["10", "11", "12", "13"] {
            let text = format!(
                "arm-smmu-v3 arm-smmu-v3.0.auto: event 0x{id} received: 0x00000068000000{id} 0x0000020000000000 \
                 0x000000005a200040 0x0000000000000000"
            );
            assert_eq!(found(&event(id, "00000068"), nic, 0x5a20_0000), Some(text));
        }
        // The first event is an access of another device to the same page.
        let both = [event("10", "00000070"), event("13", "00010068")].concat();
        assert!(found(&both, nic, 0x5a20_0000).is_some_and(|text| text.contains("event 0x13")));
        assert_eq!(found(&event("10", "00000068"), nic, 0x5a20_1000), None);
        assert_eq!(found(&event("10", "00000068"), "0000:00:0e.0", 0x5a20_0000), None);
        // A bad StreamID, and a truncated event.
        assert_eq!(found(&event("02", "00000068"), nic, 0x5a20_0000), None);
        assert_eq!(found(&event("10", "00000068")[..6], nic, 0x5a20_0000), None);
    }
}
