//! Lists and masks of cores: `-l 1-3,5`, `-l '(0,1)@(2-4)'`, `-c 0x3`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use super::quoted;
use crate::affinity;
use crate::error::{Error, ErrorKind, Result};

/// Exclusive upper limit of lcore and CPU numbers: the most CPUs that Linux can be built for on x86
/// (`CONFIG_NR_CPUS`).
pub const MAX_CORES: usize = 8192;

/// Result of a parsing step. The error says what is wrong.
type Read<T> = std::result::Result<T, String>;

/// A logical core: one thread of the program, and the CPUs that it may run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LcoreSpec {
    /// Id of the lcore, below [`MAX_CORES`].
    pub id: u32,
    /// CPUs that the thread may run on, in ascending order, never empty.
    pub cpus: Vec<usize>,
}

impl fmt::Display for LcoreSpec {
    /// Writes the notation of `--lcores`: `1`, `1@3`, `1@(2-4)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.cpus[..] {
            [cpu] if cpu == self.id as usize => write!(f, "{cpu}"),
            [cpu] => write!(f, "{}@{cpu}", self.id),
            _ => write!(f, "{}@({})", self.id, ranges(&self.cpus)),
        }
    }
}

/// Formats ascending numbers as ranges: `0-2,5`.
pub fn ranges(numbers: &[usize]) -> String {
    numbers
        .chunk_by(|low, high| low + 1 == *high)
        .map(|run| match run {
            [first, .., last] => format!("{first}-{last}"),
            _ => run.iter().map(ToString::to_string).collect(),
        })
        .collect::<Vec<_>>()
        .join(",")
}

/// Returns the CPUs that the process may run on: online, in its cpuset and in its affinity.
///
/// # Errors
/// `Os` if the kernel does not report them.
pub fn allowed_cpus() -> Result<Vec<usize>> {
    affinity::get().map_err(|errno| Error::os("cannot read the affinity", errno))
}

/// Returns the CPUs that are threads of the same core as `cpu`, including `cpu`, in the kernel's format
/// (`0,4`). `sysfs` is `/sys` on a real machine.
pub fn core_siblings(sysfs: &Path, cpu: usize) -> Option<String> {
    let path = sysfs.join(format!("devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"));
    std::fs::read_to_string(path).ok().map(|list| list.trim().to_owned())
}

/// Returns a warning if two of `lcores` run on threads of one core according to `sysfs`. It names only the
/// first two.
pub(super) fn shared_core(lcores: &[LcoreSpec], sysfs: &Path) -> Option<String> {
    let mut seen: BTreeMap<String, &LcoreSpec> = BTreeMap::new();
    lcores.iter().find_map(|lcore| {
        // An lcore with several CPUs can move away from the shared core.
        let [cpu] = lcore.cpus[..] else { return None };
        let siblings = core_siblings(sysfs, cpu)?;
        let other = seen.insert(siblings.clone(), lcore).filter(|other| other.cpus != [cpu])?;
        Some(format!(
            "lcores {} and {} run on threads of the same core (CPUs {siblings}) and share its resources; \
             give each its own core with -l (lscpu -e)",
            other.id, lcore.id
        ))
    })
}

/// Parses the value of `--lcores`, whose CPUs must all be in `allowed`. The result is in ascending order of
/// id.
///
/// # Errors
/// `Usage`, naming the invalid part and the usable cores.
pub(super) fn parse_list(text: &str, allowed: &[usize]) -> Result<Vec<LcoreSpec>> {
    Cursor { rest: text }
        .list()
        .and_then(|cores| check(cores, allowed))
        .map_err(|why| wrong("--lcores", text, why, allowed))
}

/// Parses the value of `--coremask`, which is hexadecimal. Bit n stands for lcore n on CPU n.
///
/// # Errors
/// Same as [`parse_list`].
pub(super) fn parse_mask(text: &str, allowed: &[usize]) -> Result<Vec<LcoreSpec>> {
    let trimmed = text.trim();
    let digits = trimmed.strip_prefix("0x").or_else(|| trimmed.strip_prefix("0X")).unwrap_or(trimmed);
    let mut cores = BTreeMap::new();
    let read = || {
        for (place, digit) in digits.chars().rev().enumerate() {
            let bits = digit.to_digit(16).ok_or_else(|| format!("{digit:?} is not a hexadecimal digit"))?;
            for core in (0..4).filter(|bit| bits >> bit & 1 == 1).map(|bit| place * 4 + bit) {
                cores.insert(core, BTreeSet::from([core]));
            }
        }
        check(cores, allowed)
    };
    read().map_err(|why| wrong("--coremask", text, why, allowed))
}

/// Renumbers `lcores` from `first` on (`--remap-lcore-ids`). Each lcore must be on the CPU of its id.
///
/// # Errors
/// `Usage` if an lcore is not on the CPU of its id, or if an id would be [`MAX_CORES`] or more.
pub(super) fn remap(lcores: &mut [LcoreSpec], first: u32) -> Result<()> {
    let wrong = |why: String, hint: &str| {
        Err(Error::new(ErrorKind::Usage, format!("--remap-lcore-ids={first}"), why).with_hint(hint))
    };
    if let Some(lcore) = lcores.iter().find(|lcore| lcore.cpus != [lcore.id as usize]) {
        return wrong(format!("-l already gives lcore {lcore} its own id"), "leave --remap-lcore-ids out");
    }
    if first as usize + lcores.len() > MAX_CORES {
        return wrong(format!("the highest id is {}", MAX_CORES - 1), "use --remap-lcore-ids=0");
    }
    for (lcore, id) in lcores.iter_mut().zip(first..) {
        lcore.id = id;
    }
    Ok(())
}

fn wrong(argument: &str, text: &str, why: String, allowed: &[usize]) -> Error {
    Error::new(ErrorKind::Usage, format!("{argument} {}", quoted(text)), why)
        .with_hint(format!("use cores {}", ranges(allowed)))
}

fn check(cores: BTreeMap<usize, BTreeSet<usize>>, allowed: &[usize]) -> Read<Vec<LcoreSpec>> {
    if cores.is_empty() {
        return Err("it selects no core".into());
    }
    if let Some(cpu) = cores.values().flatten().find(|cpu| !allowed.contains(cpu)) {
        return Err(unavailable_reason(*cpu));
    }
    let spec =
        |(id, cpus): (usize, BTreeSet<usize>)| LcoreSpec { id: id as u32, cpus: cpus.into_iter().collect() };
    Ok(cores.into_iter().map(spec).collect())
}

fn unavailable_reason(cpu: usize) -> String {
    let dir = Path::new("/sys/devices/system/cpu").join(format!("cpu{cpu}"));
    if !dir.exists() {
        format!("core {cpu} does not exist")
    } else if std::fs::read_to_string(dir.join("online")).is_ok_and(|online| online.trim() == "0") {
        format!("core {cpu} is offline")
    } else {
        format!("core {cpu} is outside the affinity or cpuset of the process")
    }
}

/// Text that is left to parse. Every step is bounded by the length of the text and by [`MAX_CORES`].
struct Cursor<'a> {
    rest: &'a str,
}

impl Cursor<'_> {
    fn list(mut self) -> Read<BTreeMap<usize, BTreeSet<usize>>> {
        let mut cores = BTreeMap::new();
        loop {
            let (ids, group) = self.set()?;
            let shared = match self.eat('@') {
                true => Some(self.set()?.0),
                false => group.then(|| ids.clone()),
            };
            for id in ids {
                let cpus = shared.clone().unwrap_or_else(|| BTreeSet::from([id]));
                if cores.insert(id, cpus).is_some() {
                    return Err(format!("lcore {id} is given twice"));
                }
            }
            if !self.eat(',') {
                break;
            }
        }
        match self.rest {
            "" => Ok(cores),
            _ => Err(self.unexpected("a comma or the end")),
        }
    }

    /// Parses a number, a range, or a group of them in parentheses. Returns true for a group.
    fn set(&mut self) -> Read<(BTreeSet<usize>, bool)> {
        let group = self.eat('(');
        let mut cores = BTreeSet::new();
        loop {
            let first = self.number()?;
            let last = if self.eat('-') { self.number()? } else { first };
            cores.extend(first.min(last)..=first.max(last));
            if !(group && self.eat(',')) {
                break;
            }
        }
        if group && !self.eat(')') {
            return Err(self.unexpected("a closing parenthesis"));
        }
        Ok((cores, group))
    }

    fn number(&mut self) -> Read<usize> {
        self.skip_blanks();
        let len = self.rest.bytes().take_while(u8::is_ascii_digit).count();
        if len == 0 {
            return Err(self.unexpected("a core number"));
        }
        let (digits, rest) = self.rest.split_at(len);
        self.rest = rest;
        match digits.parse() {
            Ok(core) if core < MAX_CORES => Ok(core),
            _ => Err(format!("core {} is above the maximum, {}", quoted(digits), MAX_CORES - 1)),
        }
    }

    fn eat(&mut self, wanted: char) -> bool {
        self.skip_blanks();
        let rest = self.rest.strip_prefix(wanted);
        self.rest = rest.unwrap_or(self.rest);
        self.skip_blanks();
        rest.is_some()
    }

    fn skip_blanks(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t']);
    }

    fn unexpected(&self, wanted: &str) -> String {
        match self.rest.chars().next() {
            Some(found) => format!("expected {wanted}, found {found:?}"),
            None => format!("expected {wanted} at the end"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> String {
        let all: Vec<_> = (0..MAX_CORES).collect();
        let specs = parse_list(text, &all).unwrap();
        specs.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
    }

    #[test]
    fn the_notations_of_dpdk() {
        assert_eq!(read("1-3,5"), "1,2,3,5");
        assert_eq!(read("3-1"), "1,2,3");
        assert_eq!(read("0@2"), "0@2");
        assert_eq!(read("(0,1)@(2-4)"), "0@(2-4),1@(2-4)");
        assert_eq!(read("0-1@2"), "0@2,1@2");
        assert_eq!(read("(0,6),8"), "0@(0,6),6@(0,6),8");
        assert_eq!(
            read(" 1, 2@(5 - 7),(3-5)@(0,2),(0,6),7-8 "),
            "0@(0,6),1,2@(5-7),3@(0,2),4@(0,2),5@(0,2),6@(0,6),7,8"
        );
    }

    #[test]
    fn wrong_lists_name_the_part_and_the_cores() {
        let cases = [
            ("", "expected a core number at the end"),
            ("1-", "expected a core number at the end"),
            ("-1", "expected a core number, found '-'"),
            ("0,,1", "expected a core number, found ','"),
            ("0x1", "expected a comma or the end, found 'x'"),
            ("(0,1", "expected a closing parenthesis at the end"),
            ("0@", "expected a core number at the end"),
            ("0-1-2", "expected a comma or the end, found '-'"),
            ("0,0", "lcore 0 is given twice"),
            ("0-1,(1)@0", "lcore 1 is given twice"),
            ("8192", "core \"8192\" is above the maximum, 8191"),
            ("0-99999999999999999999999", "core \"99999999999999999999999\" is above the maximum, 8191"),
            ("8191", "core 8191 does not exist"),
        ];
        for (text, why) in cases {
            let error = parse_list(text, &[0, 1]).unwrap_err();
            assert_eq!(error.to_string(), format!("--lcores {text:?}: {why}; use cores 0-1"));
            assert_eq!(error.kind(), ErrorKind::Usage);
        }
    }

    #[test]
    fn a_core_outside_the_affinity() {
        let error = parse_list("0", &[1]).unwrap_err();
        assert!(error.to_string().ends_with("affinity or cpuset of the process; use cores 1"), "{error}");
    }

    #[test]
    fn masks() {
        let all: Vec<_> = (0..MAX_CORES).collect();
        let ids = |text| parse_mask(text, &all).unwrap().iter().map(|spec| spec.id).collect::<Vec<_>>();
        assert_eq!(ids("0x3"), [0, 1]);
        assert_eq!(ids("F0"), [4, 5, 6, 7]);
        assert_eq!(ids("000000000000000000000000000000000000000000100000000000000000"), [68]);
        for text in ["", "0x", "0", "0xg", "4", "é", "-1"] {
            assert_eq!(parse_mask(text, &[0, 1]).unwrap_err().kind(), ErrorKind::Usage, "{text}");
        }
    }

    #[test]
    fn threads_of_one_core_are_named() {
        let sysfs = tempfile::tempdir().unwrap();
        for (cpu, siblings) in [(0, "0,4\n"), (1, "1,5\n"), (4, "0,4\n"), (5, "1,5\n")] {
            let topology = sysfs.path().join(format!("devices/system/cpu/cpu{cpu}/topology"));
            std::fs::create_dir_all(&topology).unwrap();
            std::fs::write(topology.join("thread_siblings_list"), siblings).unwrap();
        }
        let all: Vec<_> = (0..6).collect();
        let warning = |list: &str| shared_core(&parse_list(list, &all).unwrap(), sysfs.path());
        assert_eq!(
            warning("0-1,5").unwrap(),
            "lcores 1 and 5 run on threads of the same core (CPUs 1,5) and share its resources; \
             give each its own core with -l (lscpu -e)"
        );
        assert!(warning("7@0,3@4").unwrap().contains("lcores 3 and 7"));
        for list in ["0-1", "0,5", "0@(0,4),4", "2-3", "0@1,1@1"] {
            assert_eq!(warning(list), None, "{list}");
        }
    }

    #[test]
    fn what_we_may_use_is_in_the_affinity() {
        let cpus = allowed_cpus().unwrap();
        assert!(!cpus.is_empty());
        assert!(cpus.is_sorted());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[-0-9,@() x]{0,40}|.*") {
            let _ = parse_list(&text, &[0, 1]);
            let _ = parse_mask(&text, &[0, 1]);
        }

        #[test]
        fn a_mask_has_the_bits_of_its_number(mask in 1_u128.., upper: bool) {
            let text = if upper { format!("0X{mask:X}") } else { format!("{mask:x}") };
            let wanted: Vec<usize> = (0..128).filter(|bit| mask >> bit & 1 == 1).collect();
            let all: Vec<_> = (0..MAX_CORES).collect();
            let specs = parse_mask(&text, &all).unwrap();
            prop_assert!(specs.iter().all(|spec| spec.cpus == [spec.id as usize]));
            prop_assert!(specs.iter().map(|spec| spec.id as usize).eq(wanted));
        }

        #[test]
        fn round_trip(cores in prop::collection::btree_map(0u32..1024, prop::collection::btree_set(0usize..1024, 1..9), 1..40)) {
            let all: Vec<_> = (0..MAX_CORES).collect();
            let specs: Vec<_> = cores
                .into_iter()
                .map(|(id, cpus)| LcoreSpec { id, cpus: cpus.into_iter().collect() })
                .collect();
            let text = specs.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
            prop_assert_eq!(parse_list(&text, &all), Ok(specs));
        }
    }
}
