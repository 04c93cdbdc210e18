//! Test cases: each has a name, a tier, a time limit and a function.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::process::Started;

/// Default time limit of a case in seconds.
const LIMIT: u64 = 120;

/// When a case runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tier {
    /// Always.
    Default,
    /// Without `--full` only, because a case of [`Tier::Full`] does the same and more.
    Short,
    /// With `--full` only.
    Full,
}

/// What runs at the same time as a case of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Company {
    /// Nothing.
    Nobody,
    /// Guests and other such cases, because the case shares nothing with them and has time.
    Guests,
    /// Cases that run alongside guests. This case boots a guest itself, after the guests that run cases: those build the
    /// kernel if it is missing.
    InPlaceOfAGuest,
}

type Run = Box<dyn Fn(&Context) -> Result<()> + Send + Sync>;

/// A test case.
pub(crate) struct Case {
    /// Name, unique within the boot or within the host's cases.
    pub(crate) name: String,
    /// When the case runs.
    pub(crate) tier: Tier,
    /// Whether the case runs on both kernels, because its result depends on the kernel; in the guest only. Other cases
    /// run on the first kernel.
    pub(crate) on_both_kernels: bool,
    /// Time after which the case counts as hung.
    pub(crate) limit: Duration,
    /// What runs at the same time; on the host only.
    pub(crate) company: Company,
    run: Run,
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Case").field("name", &self.name).field("tier", &self.tier).finish_non_exhaustive()
    }
}

impl Case {
    /// Makes the case run on both kernels.
    pub(crate) fn on_both_kernels(&mut self) -> &mut Self {
        self.on_both_kernels = true;
        self
    }

    /// Makes the case run without `--full` only.
    pub(crate) fn not_in_full(&mut self) -> &mut Self {
        self.tier = Tier::Short;
        self
    }

    /// Makes the case run with `--full` only.
    pub(crate) fn in_full(&mut self) -> &mut Self {
        self.tier = Tier::Full;
        self
    }

    /// Does what [`Case::in_full`] does if `condition` is true.
    pub(crate) fn in_full_if(&mut self, condition: bool) -> &mut Self {
        if condition { self.in_full() } else { self }
    }

    /// Lets the case run alongside guests and other such cases; on the host only.
    pub(crate) fn alongside_guests(&mut self) -> &mut Self {
        self.company = Company::Guests;
        self
    }

    /// Lets the case, which boots a guest, run after the guests that run cases; on the host only.
    pub(crate) fn in_place_of_a_guest(&mut self) -> &mut Self {
        self.company = Company::InPlaceOfAGuest;
        self
    }

    /// Sets the time limit in seconds.
    pub(crate) fn limit(&mut self, seconds: u64) -> &mut Self {
        self.limit = Duration::from_secs(seconds);
        self
    }

    /// Runs the case in an empty directory of its own. A panic fails the case.
    pub(crate) fn run(&self, full: bool, programs: &Path, started: &Started) -> Report {
        run_once(self.name.clone(), full, programs, started, &self.run)
    }
}

/// Runs `body` as a case with this name.
pub(crate) fn run_once(
    name: String,
    full: bool,
    programs: &Path,
    started: &Started,
    body: impl FnOnce(&Context) -> Result<()>,
) -> Report {
    let dir = match tempfile::Builder::new().prefix("vireo-case.").tempdir() {
        Ok(dir) => dir,
        Err(error) => {
            return Report {
                name,
                ..Report::failed(format!("cannot create a directory for the case: {error}"))
            };
        }
    };
    let context = Context {
        dir: dir.path().into(),
        full,
        started: started.clone(),
        programs: programs.into(),
        notes: RefCell::default(),
    };
    let result = catch_unwind(AssertUnwindSafe(|| body(&context)));
    let outcome = match result {
        Ok(Ok(())) => Outcome::Passed,
        Ok(Err(error)) => match Outcome::of(&error) {
            Outcome::Failed(why) => Outcome::Failed(format!("{why}\n{}", output_of(dir.path()))),
            skipped => skipped,
        },
        Err(_) => Outcome::Failed(format!("the case panicked\n{}", output_of(dir.path()))),
    };
    Report { name, outcome, notes: context.notes.into_inner() }
}

/// Output of a failed case's programs: the last lines of each `*.out` and `*.err` in its directory.
fn output_of(dir: &Path) -> String {
    const LINES: usize = 20;
    const WIDTH: usize = 250;
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|kind| kind == "out" || kind == "err"));
    files.sort();
    let mut text = String::new();
    for file in files {
        let content = String::from_utf8_lossy(&std::fs::read(&file).unwrap_or_default()).into_owned();
        let lines: Vec<&str> = content.lines().collect();
        for line in &lines[lines.len().saturating_sub(LINES)..] {
            let line: String = line.chars().take(WIDTH).collect();
            text += &format!("{}: {line}\n", file.file_name().unwrap_or_default().to_string_lossy());
        }
    }
    text
}

/// List of cases.
#[derive(Debug, Default)]
pub(crate) struct Cases(pub(crate) Vec<Case>);

impl Cases {
    /// Adds a case and returns it, to set its tier and limit.
    pub(crate) fn add(
        &mut self,
        name: impl Into<String>,
        run: impl Fn(&Context) -> Result<()> + Send + Sync + 'static,
    ) -> &mut Case {
        let index = self.0.len();
        self.0.push(Case {
            name: name.into(),
            tier: Tier::Default,
            on_both_kernels: false,
            limit: Duration::from_secs(LIMIT),
            company: Company::Nobody,
            run: Box::new(run),
        });
        &mut self.0[index]
    }
}

/// State of a running case: its directory, the programs, and notes for its report.
#[derive(Debug)]
pub(crate) struct Context {
    /// Directory of the case, empty at the start and removed at the end. It holds the programs' output.
    pub(crate) dir: PathBuf,
    /// Whether long loops run in full (`--full`).
    pub(crate) full: bool,
    /// The case's programs.
    pub(crate) started: Started,
    programs: PathBuf,
    notes: RefCell<Vec<String>>,
}

impl Context {
    /// Path of one of Vireo's programs, by its short name.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.programs.join(format!("vireo-{name}"))
    }

    /// Path of `name` in the case's directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Short word for names outside the directory, unique among all runs on this machine. The process id is
    /// not unique, because another run may be in another PID namespace.
    pub(crate) fn unique(&self) -> Cow<'_, str> {
        self.dir.extension().unwrap_or_default().to_string_lossy()
    }

    /// Adds a line to the report.
    pub(crate) fn note(&self, line: impl Into<String>) {
        self.notes.borrow_mut().push(line.into());
    }
}

/// How a case ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Outcome {
    /// The case passed.
    #[default]
    Passed,
    /// The case failed, with the reason and the output of its programs.
    Failed(String),
    /// The case cannot run here, for this reason.
    Skipped(String),
}

impl Outcome {
    /// Outcome of a case that ended with `error`: failed, unless `error` is the one of [`skip`].
    pub(crate) fn of(error: &anyhow::Error) -> Self {
        match error.downcast_ref::<Skip>() {
            Some(Skip(reason)) => Self::Skipped(reason.clone()),
            None => Self::Failed(format!("{error:#}")),
        }
    }
}

/// Outcome and notes of a case.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    /// Name of the case.
    pub(crate) name: String,
    /// Outcome of the case.
    pub(crate) outcome: Outcome,
    /// Further lines of the report.
    pub(crate) notes: Vec<String>,
}

impl Report {
    /// Report of a case that failed with `why`, without a name.
    pub(crate) fn failed(why: String) -> Self {
        Self { outcome: Outcome::Failed(why), ..Self::default() }
    }
}

/// Prefix of the reason that a script prints if it cannot do here what a case needs.
const SKIPPED: &str = "SKIPPED: ";

/// Reason for which a script skips, if its output has one.
pub(crate) fn skipped_by(output: &str) -> Option<&str> {
    output.lines().find_map(|line| line.split_once(SKIPPED).map(|(_, reason)| reason))
}

/// Error that skips a case.
#[derive(Debug)]
struct Skip(String);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "skipped: {}", self.0)
    }
}

impl std::error::Error for Skip {}

/// Returns the error that ends the case as skipped.
pub(crate) fn skip<T>(reason: impl Into<String>) -> Result<T> {
    Err(Skip(reason.into()).into())
}

/// Reads a file. Errors contain its name.
pub(crate) fn read(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    std::fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .with_context(|| format!("cannot read {}", path.display()))
}

/// Writes to an existing file, such as one of sysfs. Errors contain its name.
pub(crate) fn write(path: impl AsRef<Path>, text: impl AsRef<str>) -> Result<()> {
    let path = path.as_ref();
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    std::io::Write::write_all(&mut file, text.as_ref().as_bytes())
        .with_context(|| format!("cannot write '{}' to {}", text.as_ref(), path.display()))
}
