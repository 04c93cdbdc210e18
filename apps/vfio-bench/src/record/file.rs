//! File format of a recording: one line of JSON per measurement, written as soon as it is complete, so that
//! whatever ends the recording loses nothing measured before.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vireo_eal::{Error, ErrorKind, Result};

use super::{Ceiling, Environment, MapTime, Plan, Recording, Run};

/// Version of the format of lines.
const SCHEMA: u32 = 2;

/// One line of the file.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Entry {
    Begin { schema: u32, environment: Environment, plan: Plan },
    Run(Run),
    Map(MapTime),
    Ceiling(Ceiling),
    End(String),
}

/// The part of the first line that every version has.
#[derive(Deserialize)]
struct Opening {
    begin: Versioned,
}

#[derive(Deserialize)]
struct Versioned {
    schema: u32,
}

/// A recording that grows in memory and in its file.
#[derive(Debug)]
pub(crate) struct Recorder {
    path: PathBuf,
    file: File,
    /// Everything recorded so far.
    pub(crate) recording: Recording,
}

impl Recorder {
    /// Begins a recording in `path`, replacing an existing file.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(crate) fn begin(path: &Path, environment: Environment, plan: Plan) -> Result<Self> {
        let file = File::create(path).map_err(|error| cannot("write", path, &error))?;
        let recording =
            Recording { environment: environment.clone(), plan: Some(plan.clone()), ..Recording::default() };
        let mut recorder = Self { path: path.to_owned(), file, recording };
        recorder.write(&Entry::Begin { schema: SCHEMA, environment, plan })?;
        Ok(recorder)
    }

    /// Resumes the recording in `path`, which must have the same plan and machine and must not be complete.
    /// Discards everything after its last complete round.
    ///
    /// # Errors
    /// `Usage` if the recording cannot be resumed.
    pub(crate) fn resume(path: &Path, environment: &Environment, plan: &Plan) -> Result<Self> {
        let mut recording = read_part(path)?.recording;
        let refused = |why: String| {
            Error::new(ErrorKind::Usage, format!("cannot resume {}", path.display()), why)
                .with_hint("start a new one: run --json FILE without --resume")
        };
        let Some(recorded) = recording.plan.clone() else {
            return Err(refused("it was made by an older Vireo".into()));
        };
        // Each start draws a new seed. The seed in the file stays valid.
        if recorded != (Plan { seed: recorded.seed, ..plan.clone() }) {
            return Err(refused(format!("it was made with other arguments: {recorded:?}")));
        }
        if let Some(difference) = recording.environment.other_machine(environment) {
            return Err(refused(format!("it was made on another machine: {difference}")));
        }
        if let Some(end) = &recording.end {
            return Err(refused(format!("it is complete: {end}")));
        }
        let unfinished = recording.runs.iter().map(|run| run.round).max().unwrap_or(0);
        recording.runs.retain(|run| run.round < unfinished);
        recording.maps.retain(|map| map.round < unfinished);
        recording.ceilings.retain(|ceiling| ceiling.round < unfinished);
        let scratch = path.with_extension("resumed");
        let mut recorder = Self::begin(&scratch, recording.environment.clone(), recorded)?;
        let Recording { runs, maps, ceilings, .. } = recording;
        runs.into_iter().try_for_each(|run| recorder.run(run))?;
        maps.into_iter().try_for_each(|map| recorder.map(map))?;
        ceilings.into_iter().try_for_each(|ceiling| recorder.ceiling(ceiling))?;
        fs::rename(&scratch, path).map_err(|error| cannot("write", path, &error))?;
        path.clone_into(&mut recorder.path);
        Ok(recorder)
    }

    /// Adds a run.
    pub(crate) fn run(&mut self, run: Run) -> Result<()> {
        self.write(&Entry::Run(run.clone()))?;
        self.recording.runs.push(run);
        Ok(())
    }

    /// Adds a map and unmap.
    pub(crate) fn map(&mut self, map: MapTime) -> Result<()> {
        self.write(&Entry::Map(map.clone()))?;
        self.recording.maps.push(map);
        Ok(())
    }

    /// Adds a run without a forwarder.
    pub(crate) fn ceiling(&mut self, ceiling: Ceiling) -> Result<()> {
        self.write(&Entry::Ceiling(ceiling.clone()))?;
        self.recording.ceilings.push(ceiling);
        Ok(())
    }

    /// Ends the recording.
    pub(crate) fn end(mut self, why: String) -> Result<()> {
        self.write(&Entry::End(why))
    }

    fn write(&mut self, entry: &Entry) -> Result<()> {
        let mut line = serde_json::to_vec(entry).map_err(|error| {
            Error::new(ErrorKind::Protocol, "cannot encode the recording", error.to_string())
        })?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(|error| cannot("write", &self.path, &error))
    }
}

fn cannot(what: &str, path: &Path, error: &std::io::Error) -> Error {
    Error::io(format!("cannot {what} recording {}", path.display()), error)
}

/// The readable part of a recording.
struct Part {
    recording: Recording,
    /// What is wrong with the rest, if anything.
    fault: Option<String>,
}

/// Reads a recording. With `partial`, reads as far as it goes.
///
/// # Errors
/// If the file cannot be read, has another schema, or is incomplete and `partial` is not set.
pub(crate) fn read(path: &Path, partial: bool) -> Result<Recording> {
    let Part { recording, fault } = read_part(path)?;
    match fault {
        Some(fault) if !partial => {
            let kept = format!("{fault}; readable runs: {}", recording.runs.len());
            Err(Error::new(ErrorKind::Io, format!("cannot read recording {}", path.display()), kept)
                .with_hint("resume it with run --resume, or report the readable part with report --partial"))
        }
        _ => Ok(recording),
    }
}

fn read_part(path: &Path) -> Result<Part> {
    let text = fs::read_to_string(path).map_err(|error| cannot("read", path, &error))?;
    let unreadable =
        |why: String| Error::new(ErrorKind::Io, format!("cannot read recording {}", path.display()), why);
    let mut lines = (1_usize..).zip(text.lines());
    let first = lines.next().map_or("", |(_, line)| line);
    let Ok(Opening { begin: Versioned { schema } }) = serde_json::from_str(first) else {
        // Vireo before 0.2 wrote one object.
        let recording = serde_json::from_str(&text).map_err(|error| unreadable(error.to_string()))?;
        return Ok(Part { recording, fault: None });
    };
    if schema != SCHEMA {
        return Err(unreadable(format!("it has schema {schema}, but this Vireo reads {SCHEMA}")));
    }
    let (environment, plan) = match serde_json::from_str(first) {
        Ok(Entry::Begin { environment, plan, .. }) => (environment, plan),
        Ok(_) => return Err(unreadable("its first line does not begin a recording".into())),
        Err(error) => return Err(unreadable(error.to_string())),
    };
    let mut recording = Recording { environment, plan: Some(plan), ..Recording::default() };
    for (number, line) in lines {
        match serde_json::from_str(line) {
            Ok(Entry::Run(run)) => recording.runs.push(run),
            Ok(Entry::Map(map)) => recording.maps.push(map),
            Ok(Entry::Ceiling(ceiling)) => recording.ceilings.push(ceiling),
            Ok(Entry::End(why)) => recording.end = Some(why),
            Ok(Entry::Begin { .. }) => {
                let fault = Some(format!("another recording begins at line {number}"));
                return Ok(Part { recording, fault });
            }
            Err(error) => {
                let fault = Some(format!("line {number} is damaged or cut off ({error})"));
                return Ok(Part { recording, fault });
            }
        }
    }
    let fault = recording.end.is_none().then(|| "its end is missing".to_owned());
    Ok(Part { recording, fault })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        Plan {
            modes: vec!["container".into(), "cdev".into()],
            seed: 7,
            rounds: 12,
            width: 0.05,
            limit: 60.0,
            stream: 0.2,
            map_mib: 128,
            ..Plan::default()
        }
    }

    fn here(cpu: &str) -> Environment {
        Environment(vec![("cpu".into(), cpu.into())])
    }

    fn run(round: u32) -> Run {
        Run { nic: "e1000".into(), mode: "cdev".into(), round, pair: Run::COMPARED.into(), ..Run::default() }
    }

    /// Returns a recording of two rounds, the second of which has `runs` runs.
    fn interrupted(path: &Path, runs: u32) -> Recorder {
        let mut recorder = Recorder::begin(path, here("A"), plan()).unwrap();
        for round in [0, 0].into_iter().chain((0..runs).map(|_| 1)) {
            recorder.run(run(round)).unwrap();
        }
        recorder.map(MapTime { round: 0, ..MapTime::default() }).unwrap();
        recorder.ceiling(Ceiling { nic: "e1000".into(), round: 0, pps: 1.0 }).unwrap();
        recorder
    }

    #[test]
    fn what_was_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.json");
        interrupted(&path, 2).end("after 2 rounds".into()).unwrap();
        let recording = read(&path, false).unwrap();
        assert_eq!((recording.runs.len(), recording.maps.len(), recording.ceilings.len()), (4, 1, 1));
        assert_eq!((recording.end.as_deref(), recording.plan), (Some("after 2 rounds"), Some(plan())));
    }

    #[test]
    fn a_recording_without_end_is_refused_and_its_part_can_be_had() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.json");
        drop(interrupted(&path, 1));
        let error = read(&path, false).unwrap_err().to_string();
        assert!(
            error.contains("run.json: its end is missing; readable runs: 3") && error.contains("--resume"),
            "{error}"
        );
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, &text[..text.len() - 5]).unwrap();
        let error = read(&path, false).unwrap_err().to_string();
        assert!(error.contains("line 6 is damaged or cut off"), "{error}");
        assert_eq!(read(&path, true).unwrap().runs.len(), 3);
        fs::write(&path, format!("{text}{text}")).unwrap();
        assert!(read(&path, false).unwrap_err().to_string().contains("another recording begins at line 7"));
    }

    #[test]
    fn another_schema_is_refused_by_its_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.json");
        fs::write(&path, "{\"begin\":{\"schema\":3,\"news\":1}}\n").unwrap();
        assert!(
            read(&path, true).unwrap_err().to_string().contains("it has schema 3, but this Vireo reads 2")
        );
        fs::write(&path, "{\"begin\":{\"schema\":2}}\n").unwrap();
        assert!(read(&path, true).unwrap_err().to_string().contains("missing field `environment`"));
    }

    #[test]
    fn a_recording_goes_on_after_its_last_whole_round() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.json");
        drop(interrupted(&path, 1));
        // Each start draws a new seed. The seed in the file stays valid.
        let mut recorder = Recorder::resume(&path, &here("A"), &Plan { seed: 8, ..plan() }).unwrap();
        assert_eq!(recorder.recording.plan, Some(plan()));
        assert_eq!(recorder.recording.runs.len(), 2);
        recorder.run(run(1)).unwrap();
        recorder.end("after 2 rounds".into()).unwrap();
        assert_eq!(read(&path, false).unwrap().runs.len(), 3);
        let refused = |environment: &Environment, plan: &Plan| {
            Recorder::resume(&path, environment, plan).unwrap_err().to_string()
        };
        assert!(refused(&here("A"), &plan()).contains("it is complete: after 2 rounds"));
        assert!(refused(&here("B"), &plan()).contains("on another machine: cpu A and B"));
        assert!(refused(&here("A"), &Plan { rounds: 6, ..plan() }).contains("with other arguments"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
