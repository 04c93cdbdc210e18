//! `vireo-top`: what the running programs of Vireo and DPDK do, from their telemetry.
#![forbid(unsafe_code)]

mod sample;
mod show;
mod view;
mod watch;

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use vireo_eal::args::parse_plain;
use vireo_eal::{Error, ErrorKind, Result, program};

use crate::view::View;
use crate::watch::{Choice, Samples, Watch};

/// Shows the rates, links, lost packets and lcores of running programs of Vireo and DPDK, from their telemetry
/// sockets.
///
/// On a terminal it shows them until q, Esc or Ctrl-C. In a pipe it prints them at every interval. The share of
/// time in which an lcore moved packets is shown if its program measures it: vireo-l2fwd with
/// --record-core-cycles.
///
/// Exit code: 0; 69 when no program answers, 64 for wrong arguments, 74 when the output cannot be written.
#[derive(Debug, Parser)]
#[command(name = "vireo-top", version)]
struct Cli {
    /// Only programs with this --file-prefix
    #[arg(short, long, value_name = "NAME", conflicts_with = "socket")]
    file_prefix: Option<String>,
    /// Telemetry socket of a program; may be repeated; default: those of this user's programs
    #[arg(short, long, value_name = "PATH")]
    socket: Vec<PathBuf>,
    /// Seconds between two looks
    #[arg(short, long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    interval: Duration,
    /// Print one interval, and end
    #[arg(long)]
    once: bool,
    /// Print a JSON object for each interval
    #[arg(long)]
    json: bool,
}

fn interval(text: &str) -> Result<Duration> {
    let seconds = text.parse().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| {
        Error::new(
            ErrorKind::Usage,
            format!("--interval {text}"),
            "it is not a number of seconds from 0.1 to 3600",
        )
    })
}

fn main() -> ExitCode {
    program::exit_code("vireo-top", run())
}

fn run() -> Result<ExitCode> {
    let Some(cli) = parse_plain::<Cli>(std::env::args_os())? else { return Ok(ExitCode::SUCCESS) };
    let mut watch = Watch::new(Choice { sockets: cli.socket.clone(), prefix: cli.file_prefix.clone() });
    let first = watch.look()?;
    if cli.once || cli.json || !std::io::stdout().is_terminal() {
        let mut before = first;
        loop {
            std::thread::sleep(cli.interval);
            let now = watch.look()?;
            let view = View::between(&before, &now);
            let line =
                |error: serde_json::Error| Error::new(ErrorKind::Io, "cannot print JSON", error.to_string());
            let text =
                if cli.json { serde_json::to_string(&view).map_err(line)? + "\n" } else { show::text(&view) };
            program::print(&text)?;
            if cli.once {
                return Ok(ExitCode::SUCCESS);
            }
            before = now;
        }
    }
    let failed = |error: std::io::Error| Error::io("cannot use the terminal", &error);
    let mut terminal = ratatui::try_init().map_err(failed)?;
    let shown = on_terminal(&mut terminal, (&mut watch, first), cli.interval);
    ratatui::restore();
    shown.map_err(failed)?;
    Ok(ExitCode::SUCCESS)
}

/// Shows the processes, whose first samples are given, until a key ends it.
fn on_terminal(
    terminal: &mut DefaultTerminal,
    (watch, mut before): (&mut Watch, Samples),
    interval: Duration,
) -> std::io::Result<()> {
    let mut view = View::default();
    let mut status = "q quits".to_owned();
    let mut due = Instant::now() + interval;
    loop {
        terminal.draw(|frame| show::draw(frame, &view, &status))?;
        if event::poll(due.saturating_duration_since(Instant::now()))? {
            if let Event::Key(key) = event::read()? {
                let is_interrupt =
                    key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
                if is_interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                    return Ok(());
                }
            }
            continue;
        }
        due += interval;
        // Programs may come back.
        match watch.look() {
            Ok(now) => {
                view = View::between(&before, &now);
                (before, status) = (now, "q quits".into());
            }
            Err(error) => (before, view, status) = (Default::default(), View::default(), error.to_string()),
        }
    }
}
