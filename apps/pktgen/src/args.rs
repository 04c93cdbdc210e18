//! Arguments after `--`.

use std::ops::RangeInclusive;
use std::time::Duration;

use clap::Parser;
use vireo_drivers::port::MacAddr;
use vireo_eal::{Error, ErrorKind, Result};

use crate::frame::{LONGEST, SHORTEST};
use crate::generator::End;

/// Minimum and maximum size of a frame in bytes.
pub type Sizes = RangeInclusive<usize>;

/// What to send.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "vireo-pktgen",
    override_usage = "vireo-pktgen [EAL ARGUMENTS] -- --dst-mac MAC [OPTIONS]",
    disable_help_flag = true
)]
pub struct Args {
    /// Port that sends
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    pub tx_port: usize,
    /// Port that receives; may be the sending port
    #[arg(long, value_name = "PORT", default_value_t = 1)]
    pub rx_port: usize,
    /// Destination address of the frames: that of the forwarder's first port
    #[arg(long, value_name = "MAC", value_parser = mac)]
    pub dst_mac: MacAddr,
    /// Destination address that the frames must have when they come back
    #[arg(long, value_name = "MAC", value_parser = mac)]
    pub expect_dst: Option<MacAddr>,
    /// Source address that the frames must have when they come back
    #[arg(long, value_name = "MAC", value_parser = mac)]
    pub expect_src: Option<MacAddr>,
    /// First send single frames until one comes back, for at most this many seconds
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub await_path: Option<Duration>,
    /// Frames per second; by default, as many as possible
    #[arg(long, value_name = "PPS", value_parser = rate)]
    pub rate: Option<f64>,
    /// Stop after this many frames
    #[arg(long, value_name = "N", conflicts_with = "duration")]
    pub count: Option<u64>,
    /// Stop after this many seconds
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub duration: Duration,
    /// Frame size in bytes without frame check sequence, 60 to 9724: one number, or minimum and maximum.
    /// Above 1514, the ports must support long frames
    #[arg(long, value_name = "BYTES[-BYTES]", default_value = "60", value_parser = sizes)]
    pub size: Sizes,
    /// Maximum number of frames in flight
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u64).range(1..))]
    pub window: u64,
    /// Print the result as one JSON object
    #[arg(long)]
    pub json: bool,
}

impl Args {
    /// Returns when the stream ends.
    pub fn end(&self) -> End {
        self.count.map_or(End::After(self.duration), End::Count)
    }
}

fn mac(text: &str) -> std::result::Result<MacAddr, String> {
    text.parse().map_err(|error: Error| error.to_string())
}

fn sizes(text: &str) -> std::result::Result<Sizes, String> {
    let (least, most) = text.split_once('-').unwrap_or((text, text));
    match (least.parse(), most.parse()) {
        (Ok(least), Ok(most)) if SHORTEST <= least && least <= most && most <= LONGEST => Ok(least..=most),
        _ => Err(format!("it is not a size from {SHORTEST} to {LONGEST}, such as 60 or 60-9000")),
    }
}

fn rate(text: &str) -> std::result::Result<f64, String> {
    text.parse()
        .ok()
        .filter(|rate: &f64| rate.is_finite() && *rate > 0.0)
        .ok_or_else(|| "it is not a rate above 0".into())
}

fn seconds(text: &str) -> std::result::Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "it is not a number of seconds".into())
}

/// Checks that port `number` exists, where there are `ports` ports.
///
/// # Errors
/// `Usage` when there is no such port.
pub fn check_port(number: usize, ports: usize) -> Result<()> {
    if number < ports {
        return Ok(());
    }
    let why = format!("the number of ports is {ports}");
    Err(Error::new(ErrorKind::Usage, format!("cannot use port {number}"), why)
        .with_hint("bind NICs with vireo-devbind, or select them with -a"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vireo_eal::args::parse_app;

    fn read(line: &str) -> Result<Args> {
        parse_app(["pktgen"].into_iter().chain(line.split_whitespace()).map(Into::into).collect())
    }

    #[test]
    fn arguments_and_defaults() {
        let args = read("--dst-mac 52:54:00:00:00:05 --rate 1e5 --count 10").unwrap();
        assert_eq!(args.dst_mac, MacAddr([0x52, 0x54, 0, 0, 0, 5]));
        assert_eq!((args.rate, args.end(), args.size), (Some(1e5), End::Count(10), 60..=60));
        assert_eq!(read("--dst-mac 52:54:00:00:00:05 --size 64-9724").unwrap().size, 64..=9724);
        assert_eq!(
            read("--dst-mac 52:54:00:00:00:05 --duration 0.5").unwrap().end(),
            End::After(Duration::from_millis(500))
        );
    }

    #[test]
    fn what_is_wrong_is_said_on_one_line() {
        for line in [
            "",
            "--dst-mac 1:2",
            "--dst-mac 52:54:00:00:00:05 --rate 0",
            "--dst-mac 52:54:00:00:00:05 --duration -1",
            "--dst-mac 52:54:00:00:00:05 --await-path soon",
            "--dst-mac 52:54:00:00:00:05 --size 59",
            "--dst-mac 52:54:00:00:00:05 --size 100-60",
            "--dst-mac 52:54:00:00:00:05 --size 60-9725",
        ] {
            let error = read(line).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage);
            assert!(!error.to_string().contains('\n'), "{error}");
        }
    }
}
