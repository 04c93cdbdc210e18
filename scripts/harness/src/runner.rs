//! Selects cases, runs them in order on the host and in guests, and deals with those that hang.

use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::sys::signal::Signal;

use crate::agent::Request;
use crate::boot::{Lab, Lost, Session};
use crate::case::{Case, Company, Outcome, Report, Tier};
use crate::clock;
use crate::guest::{BOOTS, Boot};
use crate::host;
use crate::host::stacks;
use crate::process::{PATIENCE, Started};
use crate::stop;
use crate::tap::{Progress, Tap};

/// Maximum number of cases that share a guest when several guests run at a time.
const SHARD: usize = 50;
/// Maximum number of times that a case runs again because QEMU lost a timer of its guest.
const REPEATS: u32 = 2;
/// How often a running case is checked against its limit.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Selection of the user.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choice {
    /// Patterns; the name of a case contains one of them. Empty: all cases.
    pub(crate) only: Vec<String>,
    /// Whether long cases run too.
    pub(crate) full: bool,
    /// Whether the host's cases run.
    pub(crate) host: bool,
    /// Kernels with which the guest is booted, and the name of each in case names: its release up to the
    /// second number.
    pub(crate) kernels: Vec<(String, String)>,
    /// Boots that run. Empty: all boots.
    pub(crate) boots: Vec<Boot>,
}

impl Choice {
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|pattern| name.contains(pattern.as_str()))
    }
}

/// Cases that run together: the host's, or those of a boot of one kernel.
#[derive(Debug)]
struct Group {
    /// Kernel and boot of the guest; `None` for the host.
    guest: Option<(String, Boot)>,
    /// Each case with its full name.
    cases: VecDeque<(String, Arc<Case>)>,
}

/// Groups of the chosen cases, in order.
fn chosen(choice: &Choice, host: Vec<Case>) -> Vec<Group> {
    let mut groups = Vec::new();
    let runs = |case: &Case, first: bool| {
        let in_this_suite = match case.tier {
            Tier::Default => true,
            Tier::Short => !choice.full,
            Tier::Full => choice.full,
        };
        in_this_suite && (first || case.on_both_kernels)
    };
    let cases = host.into_iter().filter(|case| runs(case, true) && choice.wants(&case.name));
    groups
        .push(Group { guest: None, cases: cases.map(|case| (case.name.clone(), Arc::new(case))).collect() });
    for (number, (kernel, release)) in choice.kernels.iter().enumerate() {
        for boot in BOOTS.into_iter().filter(|boot| choice.boots.is_empty() || choice.boots.contains(boot)) {
            let named = boot
                .cases()
                .0
                .into_iter()
                .map(|case| (format!("{release} {}: {}", boot.name(), case.name), case));
            let cases = named.filter(|(name, case)| runs(case, number == 0) && choice.wants(name));
            let cases = cases.map(|(name, case)| (name, Arc::new(case))).collect();
            groups.push(Group { guest: Some((kernel.clone(), boot)), cases });
        }
    }
    groups.retain(|group| !group.cases.is_empty());
    groups
}

/// Prints the names of the chosen cases.
pub(crate) fn list(choice: &Choice, environment: &host::Environment) -> Result<()> {
    for group in groups(choice, environment)? {
        group.cases.iter().for_each(|(name, _)| println!("{name}"));
    }
    Ok(())
}

/// Returns the groups of the chosen cases. The names of unit tests are known only after their build, so unit
/// tests are left out unless all cases are wanted, a pattern has `::` as their names have, or no other case
/// matches.
fn groups(choice: &Choice, environment: &host::Environment) -> Result<Vec<Group>> {
    let cases = |with_units| -> Result<Vec<Case>> {
        let with_guest = !choice.kernels.is_empty();
        if choice.host { host::cases(environment, with_units, with_guest) } else { Ok(Vec::new()) }
    };
    let asks_for_units = choice.only.is_empty() || choice.only.iter().any(|pattern| pattern.contains("::"));
    let mut groups = chosen(choice, cases(asks_for_units)?);
    if groups.is_empty() && !asks_for_units {
        groups = chosen(choice, cases(true)?);
    }
    if groups.is_empty() {
        let full = if choice.full { "" } else { " without --full" };
        bail!("no case matches '{}'{full}; see: scripts/test --list --full", choice.only.join("' or '"));
    }
    Ok(groups)
}

/// Runs the chosen cases, and returns the exit code.
pub(crate) fn run(
    choice: &Choice,
    environment: &host::Environment,
    (lab, programs): (&Lab, &Path),
    jobs: usize,
) -> Result<u8> {
    let groups = groups(choice, environment)?;
    let tap = Tap::default();
    let host = Host { full: choice.full, programs, tap: &tap };
    let (mut soon, mut later) = (VecDeque::new(), VecDeque::new());
    let (mut turns, mut last) = (VecDeque::new(), VecDeque::new());
    for Group { guest, mut cases } in groups {
        let Some((kernel, boot)) = guest else {
            for (_, case) in cases {
                match case.company {
                    _ if case.tier == Tier::Full => later.push_back(case),
                    Company::Nobody => soon.push_back(case),
                    Company::Guests => later.push_back(case),
                    Company::InPlaceOfAGuest => last.push_back(Turn::OnHost(case)),
                }
            }
            continue;
        };
        let shard = if jobs > 1 { SHARD } else { usize::MAX };
        while !cases.is_empty() {
            let cases = cases.drain(..shard.min(cases.len())).collect();
            turns.push_back(Turn::InGuest(kernel.clone(), boot, cases));
        }
    }
    turns.append(&mut last);
    // With --full, the host's cases take longer than the guests: the longest start first, two at a time.
    let at_a_time = if choice.full { 2 } else { 1 };
    if choice.full {
        later.make_contiguous().sort_by_key(|case| Reverse(case.limit));
    }
    host.run_from(&Mutex::new(soon));
    let (turns, later) = (Mutex::new(turns), Mutex::new(later));
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(turn) = next_of(&turns) {
                    match turn {
                        Turn::InGuest(kernel, boot, cases) => run_in_guest(lab, &kernel, boot, cases, &tap),
                        Turn::OnHost(case) => host.run(&case),
                    }
                }
                host.run_from(&later);
            });
        }
        for _ in 0..at_a_time {
            scope.spawn(|| host.run_from(&later));
        }
    });
    if let Some(code) = stop::exit_code() {
        tap.bail_out("stopped by a signal");
        return Ok(code);
    }
    Ok(tap.end())
}

/// What takes the place of one guest.
enum Turn {
    /// Cases in a guest with this kernel, booted in this way.
    InGuest(String, Boot, VecDeque<(String, Arc<Case>)>),
    /// A case that boots a guest itself.
    OnHost(Arc<Case>),
}

/// Takes the next of those that wait, unless a signal has ended the run.
fn next_of<T>(waiting: &Mutex<VecDeque<T>>) -> Option<T> {
    waiting.lock().ok()?.pop_front().filter(|_| stop::exit_code().is_none())
}

/// Runs cases on the host.
struct Host<'a> {
    full: bool,
    programs: &'a Path,
    tap: &'a Tap,
}

impl Host<'_> {
    /// Runs cases until none waits or a signal ends the run.
    fn run_from(&self, waiting: &Mutex<VecDeque<Arc<Case>>>) {
        while let Some(case) = next_of(waiting) {
            self.run(&case);
        }
    }

    /// Runs a case in a thread, and reports it. If the case exceeds its limit, the stacks of its programs are
    /// reported and the programs are killed.
    fn run(&self, case: &Arc<Case>) {
        let (started, mut progress) = (Started::default(), Progress::new(&case.name));
        let (to_report, reports) = channel();
        let (of_case, full, programs) = (Arc::clone(case), self.full, self.programs.to_owned());
        let its_programs = started.clone();
        std::thread::spawn(move || to_report.send(of_case.run(full, &programs, &its_programs)));
        let mut hung = None;
        let report = loop {
            match reports.recv_timeout(CHECK_INTERVAL) {
                Ok(report) => break report,
                Err(RecvTimeoutError::Disconnected) => {
                    break Report::failed("the thread of the case ended without a report".into());
                }
                Err(RecvTimeoutError::Timeout) => progress.tick(String::new),
            }
            if progress.elapsed() > case.limit && hung.is_none() {
                let processes = started.processes();
                let stacks: String = processes.iter().copied().map(stacks::of_process).collect();
                stacks::signal_all(&processes, Signal::SIGKILL);
                hung = Some((Instant::now(), stacks));
            }
            if hung.as_ref().is_some_and(|(since, _)| since.elapsed() > PATIENCE) {
                break Report::failed("the case continued after its programs were killed".into());
            }
        };
        let report = match (hung, &report.outcome) {
            (None, _) => report,
            (Some((_, stacks)), outcome) => {
                let after = if let Outcome::Failed(why) = outcome { why.as_str() } else { "" };
                Report::failed(format!("it took more than {} s\n{stacks}\n{after}", case.limit.as_secs()))
            }
        };
        self.tap.report(&Report { name: case.name.clone(), ..report }, progress.elapsed());
    }
}

/// Runs cases in a guest. If a case ends or hangs the guest, the remaining cases run in a new one. A case
/// during which QEMU lost a timer of the guest also runs again, up to [`REPEATS`] times.
fn run_in_guest(lab: &Lab, kernel: &str, boot: Boot, mut cases: VecDeque<(String, Arc<Case>)>, tap: &Tap) {
    let mut lost: HashMap<String, u32> = HashMap::new();
    let mut again = |name: &str| {
        let count = lost.entry(name.to_owned()).or_default();
        *count += 1;
        *count <= REPEATS
    };
    while !cases.is_empty() && stop::exit_code().is_none() {
        let mut session = match Session::start(lab, kernel, boot) {
            Ok(session) => session,
            Err(error) => {
                for (name, _) in cases {
                    let outcome = Outcome::of(&error);
                    tap.report(&Report { name, outcome, ..Report::default() }, Duration::ZERO);
                }
                return;
            }
        };
        tap.comment(&format!("Linux {}, boot '{}', {} cases", session.release, boot.name(), cases.len()));
        let mut last = None;
        while let Some((name, case)) = cases.pop_front() {
            let progress = Progress::new(&name);
            let request = Request::Case(case.name.clone());
            let (report, goes_on) = match session.request(&request, case.limit, |_| ()) {
                Ok(Report { outcome: Outcome::Failed(why), notes, .. }) if progress.elapsed() > PATIENCE => {
                    // The case waited in vain, possibly because of the guest.
                    let outcome = Outcome::Failed(format!("{why}\n{}", session.stacks()));
                    (Report { name: name.clone(), outcome, notes }, true)
                }
                Ok(report) => (Report { name: name.clone(), ..report }, true),
                Err(lost) => {
                    let why = match lost {
                        Lost::Hung => {
                            format!("it took more than {} s\n{}", case.limit.as_secs(), session.stacks())
                        }
                        Lost::Ended(said) => format!("the guest ended\n{said}"),
                    };
                    (Report { name: name.clone(), ..Report::failed(why) }, false)
                }
            };
            if let Outcome::Failed(why) = &report.outcome
                && let Some(cpu) = clock::stopped(why)
                && again(&name)
            {
                tap.comment(&format!(
                    "QEMU lost the timer of the guest's cpu {cpu}; repeating in a new guest: {name}"
                ));
                cases.push_front((name, case));
                break;
            }
            tap.report(&report, progress.elapsed());
            if !goes_on {
                break;
            }
            if cases.is_empty() {
                last = Some(name);
            }
        }
        if let Some(name) = last
            && let Err(error) = session.finish()
        {
            let name = format!("the end of the boot after {name}");
            tap.report(&Report { name, ..Report::failed(format!("{error:#}")) }, Duration::ZERO);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::case::{Cases, Context};
    use crate::process::{Process, await_that};

    fn sleeping(context: &Context) -> Result<Process> {
        Process::spawn(context, "sleep", Command::new("sleep").arg("1000"))
    }

    #[test]
    fn a_case_that_hangs_ends_with_its_programs_and_with_no_others() {
        let hung = Arc::new(OnceLock::new());
        let lived = Arc::new(AtomicBool::new(false));
        let (of_first, of_second, is_done) = (Arc::clone(&hung), hung, Arc::clone(&lived));
        let mut cases = Cases::default();
        cases
            .add("hangs", move |context| {
                let mut program = sleeping(context)?;
                let _ = of_first.set(program.pid());
                program.wait(10 * PATIENCE).map(drop)
            })
            .limit(1);
        cases.add("runs beside it", move |context| {
            let mut program = sleeping(context)?;
            await_that("the kill", PATIENCE, || {
                of_second.get().is_some_and(|pid| stacks::of_process(*pid).is_empty())
            })?;
            is_done.store(!program.has_ended(), Ordering::Relaxed);
            Ok(())
        });
        let (tap, waiting) = (Tap::default(), Mutex::new(cases.0.into_iter().map(Arc::new).collect()));
        let host = Host { full: false, programs: Path::new("/"), tap: &tap };
        std::thread::scope(|scope| (0..2).for_each(|_| drop(scope.spawn(|| host.run_from(&waiting)))));
        assert!(lived.load(Ordering::Relaxed), "the other case's program was killed too");
        assert_eq!(tap.end(), 1, "the case that hung did not fail");
    }
}
