//! The processes that are watched, and connections to them.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};

use serde_json::Value;
use vireo_eal::telemetry::{TelemetryClient, sockets};
use vireo_eal::{Error, ErrorKind, Result};

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
    clients: BTreeMap<PathBuf, (TelemetryClient, Value)>,
}

impl Watch {
    pub(crate) fn new(choice: Choice) -> Self {
        Self { choice, clients: BTreeMap::new() }
    }

    /// Samples all processes that answer, by socket.
    ///
    /// # Errors
    /// Why the first process does not answer, if none of them does; `Unavailable` if there is none.
    pub(crate) fn look(&mut self) -> Result<Samples> {
        let (mut samples, mut failure) = (BTreeMap::new(), None);
        let sockets = self.sockets()?;
        self.clients.retain(|socket, _| sockets.contains(socket));
        for socket in sockets {
            match self.sample(&socket) {
                Ok(sample) => drop(samples.insert(socket, sample)),
                Err(error) => {
                    self.clients.remove(&socket);
                    failure.get_or_insert(error);
                }
            }
        }
        if samples.is_empty() { Err(failure.unwrap_or_else(|| self.nothing())) } else { Ok(samples) }
    }

    fn sockets(&self) -> Result<Vec<PathBuf>> {
        if !self.choice.sockets.is_empty() {
            return Ok(self.choice.sockets.clone());
        }
        let mut sockets = sockets()?;
        if let Some(prefix) = &self.choice.prefix {
            let of = |socket: &Path| {
                socket.parent().and_then(Path::file_name).is_some_and(|name| name == &**prefix)
            };
            sockets.retain(|socket| of(socket));
        }
        Ok(sockets)
    }

    fn nothing(&self) -> Error {
        let which = self
            .choice
            .prefix
            .as_ref()
            .map_or(String::new(), |prefix| format!(" with --file-prefix {prefix}"));
        let why = format!("no process of Vireo or DPDK{which} has a telemetry socket that this user may use");
        Error::new(ErrorKind::Unavailable, "nothing to show", why)
            .with_hint("start one, or run vireo-top as its user or as root")
    }

    fn sample(&mut self, socket: &Path) -> Result<Sample> {
        let (client, greeting) = match self.clients.entry(socket.to_owned()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let client = TelemetryClient::connect(socket)?;
                let greeting = serde_json::from_str(client.greeting()).unwrap_or_default();
                new.insert((client, greeting))
            }
        };
        Sample::take(greeting, |request| {
            let answer: Value = serde_json::from_str(&client.ask(request)?).map_err(|error| {
                let what = format!("cannot read the answer of {} to {request}", socket.display());
                Error::new(ErrorKind::Protocol, what, error.to_string())
            })?;
            let (endpoint, _) = request.split_once(',').unwrap_or((request, ""));
            Ok(answer.get(endpoint).cloned().unwrap_or_default())
        })
    }
}
