//! `costs`: draws the figure on the README's first screen from counts that are committed to the repository.

use std::path::PathBuf;

use clap::Args;
use serde::Deserialize;
use vireo_eal::{Error, ErrorKind, Result};

use crate::count;
use crate::plot::{self, Bar};
use crate::report::{read, write};
use crate::words::three;

/// Packets per poll, and pages and call of the maps, that the figure shows.
const BURST: u32 = 32;
const MEMORY: &str = "2 MiB, map";

/// Draw instructions per packet next to DPDK's, and per mapped GiB in each VFIO mode
#[derive(Args, Debug)]
pub(crate) struct CostsArgs {
    /// Output of scripts/bench insn --update
    #[arg(long, value_name = "FILE")]
    insn: PathBuf,
    /// Output of lab count --json
    #[arg(long, value_name = "FILE")]
    counted: PathBuf,
    /// SVG file to write
    #[arg(long, value_name = "FILE")]
    svg: PathBuf,
}

#[derive(Deserialize)]
struct Insn {
    rows: Vec<InsnRow>,
}

#[derive(Deserialize)]
struct InsnRow {
    driver: String,
    device: String,
    path: String,
    /// A number, or `1+0`.
    burst: serde_json::Value,
    insn_per_packet: f64,
    dpdk: Option<f64>,
}

#[derive(Deserialize)]
struct Counted {
    counted: Vec<count::Row>,
}

pub(crate) fn costs(args: &CostsArgs) -> Result<()> {
    let (insn, counted): (Insn, Counted) = (read(&args.insn)?, read(&args.counted)?);
    write(&args.svg, &plot::costs(&packets(&insn)?, &maps(&counted)?)?)
}

/// Bars of Vireo and DPDK on each of two NICs.
fn packets(insn: &Insn) -> Result<Vec<Bar>> {
    let mut bars = Vec::new();
    for (driver, device) in [("e1000", "82574L"), ("virtio-net", "split mergeable")] {
        let fits = |row: &&InsnRow| {
            row.driver == driver && row.device == device && row.path == "tied" && row.burst == BURST
        };
        let row = insn.rows.iter().find(fits).ok_or_else(|| missing(&format!("{driver}, {device}")))?;
        let bar = |who: &str, value: f64| Bar {
            group: driver.to_owned(),
            name: who.to_owned(),
            value,
            text: three(value),
        };
        bars.push(bar("Vireo", row.insn_per_packet));
        bars.push(bar("DPDK", row.dpdk.ok_or_else(|| missing(&format!("DPDK's {driver}")))?));
    }
    Ok(bars)
}

/// One bar per mode that maps memory, on the first NIC.
fn maps(counted: &Counted) -> Result<Vec<Bar>> {
    let of_memory = |row: &&count::Row| row.step == "map" && row.memory.as_deref() == Some(MEMORY);
    let first = counted.counted.iter().find(of_memory).ok_or_else(|| missing(MEMORY))?;
    let rows = counted.counted.iter().filter(|row| of_memory(row) && row.nic == first.nic);
    let bars = rows.map(|row| {
        let value = count::cost(row) / 1e6;
        let ratio = count::cost(row) / count::cost(first);
        let text =
            if row.mode == first.mode { three(value) } else { format!("{} ({ratio:.2})", three(value)) };
        Bar { group: String::new(), name: row.mode.clone(), value, text }
    });
    Ok(bars.collect())
}

fn missing(what: &str) -> Error {
    Error::new(ErrorKind::Usage, "cannot draw the costs", format!("{what} was not counted"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_counts_are_drawn() {
        let file = |name: &str| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").join(name);
        let dir = tempfile::tempdir().unwrap();
        let svg = dir.path().join("costs.svg");
        let args = CostsArgs {
            insn: file("scripts/insn.json"),
            counted: file("docs/counted-6.12.json"),
            svg: svg.clone(),
        };
        costs(&args).unwrap();
        // A commit of new counts must also redraw the figure.
        let drawn = std::fs::read_to_string(svg).unwrap();
        assert!(
            drawn == std::fs::read_to_string(file("docs/costs.svg")).unwrap(),
            "docs/costs.svg is out of date"
        );
    }
}
