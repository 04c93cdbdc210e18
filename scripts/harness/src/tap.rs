//! The only place that prints results: TAP, with the duration of each case, and at the end the slowest cases
//! and the counts.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _, Write as _};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::case::{Outcome, Report};

/// Number of slowest cases that are listed at the end.
const SLOWEST: usize = 10;
/// Time between two progress lines in a pipe.
const PIPE_INTERVAL: Duration = Duration::from_secs(60);
/// Time between two progress lines on a terminal.
const SECOND: Duration = Duration::from_secs(1);
/// Columns of the progress line on a terminal.
const WIDTH: usize = 79;

/// Progress of the cases and boots that run now, by name.
static RUNNING: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());

#[derive(Debug, Default)]
struct Counts {
    passed: usize,
    failed: usize,
    skipped: usize,
    slowest: Vec<(Duration, String)>,
}

/// Results of a run, reported from any thread.
#[derive(Debug)]
pub(crate) struct Tap {
    counts: Mutex<Counts>,
    begun: Instant,
}

impl Default for Tap {
    fn default() -> Self {
        println!("TAP version 13");
        Self { counts: Mutex::default(), begun: Instant::now() }
    }
}

impl Tap {
    /// Prints a report.
    pub(crate) fn report(&self, report: &Report, took: Duration) {
        let Ok(mut counts) = self.counts.lock() else { return };
        let number = counts.passed + counts.failed + counts.skipped + 1;
        let (name, time) = (report.name.replace('#', "\\#"), format!("# time={:.2}s", took.as_secs_f64()));
        let mut text = match &report.outcome {
            Outcome::Passed => {
                counts.passed += 1;
                format!("ok {number} - {name} {time}\n")
            }
            Outcome::Skipped(reason) => {
                counts.skipped += 1;
                format!("ok {number} - {name} # SKIP {}\n", reason.replace('\n', " "))
            }
            Outcome::Failed(why) => {
                counts.failed += 1;
                let why: String = why.trim_end().lines().map(|line| format!("#   {line}\n")).collect();
                format!("not ok {number} - {name} {time}\n{why}")
            }
        };
        text.extend(report.notes.iter().map(|note| format!("# {note}\n")));
        counts.slowest.push((took, report.name.clone()));
        counts.slowest.sort_by_key(|(took, _)| std::cmp::Reverse(*took));
        counts.slowest.truncate(SLOWEST);
        clear_progress();
        print(&text);
    }

    /// Prints a comment.
    pub(crate) fn comment(&self, line: &str) {
        clear_progress();
        print(&format!("# {line}\n"));
    }

    /// Prints that not all cases ran.
    pub(crate) fn bail_out(self, why: &str) {
        clear_progress();
        print(&format!("Bail out! {why}\n"));
    }

    /// Prints the summary, and returns the exit code.
    pub(crate) fn end(self) -> u8 {
        let Ok(counts) = self.counts.into_inner() else { return 1 };
        let Counts { passed, failed, skipped, slowest } = counts;
        let mut text = String::from("# slowest:\n");
        text.extend(slowest.iter().map(|(took, name)| format!("# {:8.2} s  {name}\n", took.as_secs_f64())));
        let seconds = self.begun.elapsed().as_secs();
        text += &format!("# {}:{:02} in all\n1..{}\n", seconds / 60, seconds % 60, passed + failed + skipped);
        text += &format!("{passed} passed, {failed} failed, {skipped} skipped\n");
        clear_progress();
        print(&text);
        u8::from(failed > 0)
    }
}

/// Prints results. If their reader is gone, the run continues for its exit code.
fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn clear_progress() {
    if io::stderr().is_terminal() {
        eprint!("\r\x1b[K");
    }
}

/// Progress on standard error: every second on a terminal, every minute in a pipe.
#[derive(Debug)]
pub(crate) struct Progress {
    name: String,
    begun: Instant,
    said: Instant,
}

impl Progress {
    /// Begins the progress of a case or a boot.
    pub(crate) fn new(name: &str) -> Self {
        let progress = Self { name: name.into(), begun: Instant::now(), said: Instant::now() };
        if io::stderr().is_terminal() {
            progress.say("");
        }
        progress
    }

    /// Prints the progress if it is due. Must be called at least once a second. `what` describes the current
    /// step.
    pub(crate) fn tick(&mut self, what: impl FnOnce() -> String) {
        let every = if io::stderr().is_terminal() { SECOND } else { PIPE_INTERVAL };
        if self.said.elapsed() < every {
            return;
        }
        self.said = Instant::now();
        match io::stderr().is_terminal() {
            true => self.say(&what()),
            false => eprintln!("harness: {}: {} s {}", self.name, self.begun.elapsed().as_secs(), what()),
        }
    }

    fn say(&self, what: &str) {
        let text = format!("{}: {} s {what}", self.name, self.begun.elapsed().as_secs());
        show(|running| drop(running.insert(self.name.clone(), text)));
    }

    /// Time since the case or boot began.
    pub(crate) fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if io::stderr().is_terminal() {
            show(|running| drop(running.remove(&self.name)));
        }
    }
}

/// Prints the progress line after a change.
fn show(change: impl FnOnce(&mut BTreeMap<String, String>)) {
    let Ok(mut running) = RUNNING.lock() else { return };
    change(&mut running);
    eprint!("\r\x1b[K{}", in_columns(running.values(), WIDTH));
}

/// Places texts side by side in equal parts of `width` columns.
fn in_columns<'a>(texts: impl ExactSizeIterator<Item = &'a String>, width: usize) -> String {
    let part = width / texts.len().max(1);
    let fitting = |text: &String| {
        let text: String = text.chars().take(part.saturating_sub(1)).collect();
        format!("{text:part$}")
    };
    texts.map(fitting).collect::<String>().trim_end().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_fits_into_its_line() {
        let texts = ["first: 2 s".to_owned(), "a second one with a long name: 70 s".to_owned()];
        assert_eq!(in_columns(texts[..1].iter(), 40), "first: 2 s");
        assert_eq!(in_columns(texts.iter(), 40), "first: 2 s          a second one with a");
        assert_eq!(in_columns([].iter(), 40), "");
    }
}
