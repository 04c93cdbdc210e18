//! What valgrind's Lackey records, and the mappings of the program that it ran.

use super::caches::{Caches, Core};

/// Memory that both ends map: two mappings of the same bytes of a file, one for each end.
#[derive(Debug, PartialEq)]
pub(super) struct Shared {
    /// First address of the two mappings.
    starts: [u64; 2],
    len: u64,
}

/// Mapping in `/proc/PID/maps`.
struct Mapping<'a> {
    start: u64,
    len: u64,
    /// Device and inode.
    file: (&'a str, &'a str),
    offset: u64,
}

impl<'a> Mapping<'a> {
    /// Parses a line such as `7f00-7fff rw-s 00000000 00:01 42 /memfd:name (deleted)`. `None` if the mapping is
    /// not shared.
    fn parse(line: &'a str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        let (start, end) = (number(start)?, number(end)?);
        words.next().filter(|permissions| permissions.ends_with('s'))?;
        let offset = number(words.next()?)?;
        Some(Self { start, len: end - start, file: (words.next()?, words.next()?), offset })
    }
}

/// Finds memory that is mapped twice in `maps`, the contents of `/proc/PID/maps`.
pub(super) fn shared(maps: &str) -> Vec<Shared> {
    let mappings: Vec<_> = maps.lines().filter_map(Mapping::parse).collect();
    let mut found = Vec::new();
    for (i, one) in mappings.iter().enumerate() {
        for other in mappings[i + 1..].iter().filter(|other| other.file == one.file) {
            let begin = one.offset.max(other.offset);
            let end = (one.offset + one.len).min(other.offset + other.len);
            if begin < end {
                let starts = [one, other].map(|mapping| mapping.start + (begin - mapping.offset));
                found.push(Shared { starts, len: end - begin });
            }
        }
    }
    found
}

/// An access in the trace.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Access {
    at: u64,
    len: u64,
    writes: bool,
}

impl Access {
    /// Parses ` L 1ffe,8` (load), ` S 1ffe,8` (store) or ` M 1ffe,8` (load and store). `None` for other lines.
    fn parse(line: &str) -> Option<Self> {
        let (kind, place) = line.strip_prefix(' ')?.split_once(' ')?;
        let (at, len) = place.split_once(',')?;
        let writes = match kind {
            "L" => false,
            "S" | "M" => true,
            _ => return None,
        };
        Some(Self { at: u64::from_str_radix(at, 16).ok()?, len: len.parse().ok()?, writes })
    }
}

/// Runs the accesses of a trace through two caches.
pub(super) struct Replay<'a> {
    shared: &'a [Shared],
    /// Address of the word that is written before and after the accesses that count.
    mark: u64,
    /// Number of times that the word was written.
    marks: u32,
    caches: Caches,
    events: u64,
}

impl<'a> Replay<'a> {
    pub(super) fn new(shared: &'a [Shared], mark: u64) -> Self {
        Self { shared, mark, marks: 0, caches: Caches::default(), events: 0 }
    }

    pub(super) fn line(&mut self, line: &str) {
        let Some(Access { at, len, writes }) = Access::parse(line) else { return };
        if at == self.mark && writes {
            self.marks += 1;
        }
        for (shared, base) in self.shared.iter().zip((0..).step_by(1 << 40)) {
            for (start, core) in shared.starts.into_iter().zip([Core::First, Core::Second]) {
                let offset = at.wrapping_sub(start);
                if offset < shared.len {
                    let events = self.caches.access(core, base + offset, len, writes);
                    self.events += if self.marks == 1 { events } else { 0 };
                }
            }
        }
    }

    /// Number of events between the marks; `None` if there were not two marks.
    pub(super) fn events(&self) -> Option<u64> {
        (self.marks == 2).then_some(self.events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
        1000-3000 rw-s 00000000 00:01 7 /memfd:a (deleted)\n\
        5000-6000 rw-p 00000000 00:01 7 /memfd:a (deleted)\n\
        8000-9000 rw-s 00001000 00:01 7 /memfd:a (deleted)\n\
        a000-b000 rw-s 00000000 00:01 8 /memfd:b (deleted)\n";

    #[test]
    fn memory_of_both_ends_is_what_two_shared_mappings_have() {
        assert_eq!(shared(MAPS), [Shared { starts: [0x2000, 0x8000], len: 0x1000 }]);
        assert_eq!(shared("nothing\n"), []);
    }

    #[test]
    fn accesses_between_the_marks_to_memory_of_both_ends_count() {
        let shared = shared(MAPS);
        let mut replay = Replay::new(&shared, 0xf000);
        let mut lines = |lines: &[&str]| {
            lines.iter().for_each(|line| replay.line(line));
            (replay.events, replay.events())
        };
        assert_eq!(lines(&["I  2000,3", " S 2000,8", "==7== text", " S f000,4"]), (0, None));
        // The second end reads what the first has written; memory of one end does not count.
        assert_eq!(lines(&[" L 8004,4", " S a000,4", " S 1000,4", " L 2000,8"]), (1, None));
        // It writes the line, and the first end takes it back.
        assert_eq!(lines(&[" M 803f,1", " L 2000,8", " S f000,4", " M 8000,8"]), (3, Some(3)));
    }
}
