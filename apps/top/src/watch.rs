//! The processes that are watched, and connections to them.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};

use vireo_eal::Result;
use vireo_top::client::{Program, no_program, sockets};

use crate::sample::Sample;

/// Samples of processes, by socket.
pub(crate) type Samples = BTreeMap<PathBuf, Sample>;

/// Which processes are watched.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choice {
    /// Sockets. If empty, those of this user's processes.
    pub(crate) sockets: Vec<PathBuf>,
    /// Only those with this `--file-prefix`, if any.
    pub(crate) prefix: Option<String>,
}

/// Watches processes. They may come and go.
#[derive(Debug)]
pub(crate) struct Watch {
    choice: Choice,
    programs: BTreeMap<PathBuf, Program>,
}

impl Watch {
    pub(crate) fn new(choice: Choice) -> Self {
        Self { choice, programs: BTreeMap::new() }
    }

    /// Samples all processes that answer, by socket.
    ///
    /// # Errors
    /// Why the first process does not answer, if none of them does; `Unavailable` if there is none.
    pub(crate) fn look(&mut self) -> Result<Samples> {
        let (mut samples, mut failure) = (BTreeMap::new(), None);
        let sockets = self.sockets()?;
        self.programs.retain(|socket, _| sockets.contains(socket));
        for socket in sockets {
            match self.sample(&socket) {
                Ok(sample) => drop(samples.insert(socket, sample)),
                Err(error) => {
                    self.programs.remove(&socket);
                    failure.get_or_insert(error);
                }
            }
        }
        if samples.is_empty() {
            Err(failure.unwrap_or_else(|| no_program(self.choice.prefix.as_deref(), "vireo-top")))
        } else {
            Ok(samples)
        }
    }

    fn sockets(&self) -> Result<Vec<PathBuf>> {
        if !self.choice.sockets.is_empty() {
            return Ok(self.choice.sockets.clone());
        }
        sockets(self.choice.prefix.as_deref())
    }

    fn sample(&mut self, socket: &Path) -> Result<Sample> {
        let program = match self.programs.entry(socket.to_owned()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(Program::connect(socket)?),
        };
        Sample::take(program.pid(), program.version(), |request| program.ask(request))
    }
}
