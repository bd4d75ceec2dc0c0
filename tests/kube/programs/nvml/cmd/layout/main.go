// layout says whether MIG layouts fit one A100 (40 GB), by the profiles and placements of go-nvml's mock GPU. A line of
// output for each layout: "1g.5gb=2,3g.20gb=1 -> fits, 70 SMs", "-> does not fit" or "-> no such profile on this GPU: P".
//
// usage: layout a100 LAYOUT...
package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/NVIDIA/go-nvlib/pkg/nvlib/device"
	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/dgxa100"
)

const memorySlices = 8

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "layout:", err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	// The mock's tables of the H100 and the H200 are wrong: 3g has size 3 there, 1g.20gb size 1.
	if len(arguments) < 2 || arguments[0] != "a100" {
		return errors.New("usage: layout a100 LAYOUT..., such as 1g.5gb=2,2g.10gb=1")
	}
	library := dgxa100.New()
	if result := library.Init(); result != nvml.SUCCESS {
		return result
	}
	gpu, result := library.DeviceGetHandleByIndex(0)
	if result != nvml.SUCCESS {
		return result
	}
	profiles, err := profilesOf(library, gpu)
	if err != nil {
		return err
	}
	for _, layout := range arguments[1:] {
		verdict, err := judge(gpu, profiles, layout)
		if err != nil {
			return err
		}
		fmt.Println(layout, "->", verdict)
	}
	return nil
}

// profilesOf returns the GPU's profiles by the names that go-nvlib gives them.
func profilesOf(library nvml.Interface, gpu nvml.Device) (map[string]nvml.GpuInstanceProfileInfo, error) {
	wrapped, err := device.New(library).NewDevice(gpu)
	if err != nil {
		return nil, err
	}
	known, err := wrapped.GetMigProfiles()
	if err != nil {
		return nil, err
	}
	profiles := map[string]nvml.GpuInstanceProfileInfo{}
	for _, profile := range known {
		info, result := gpu.GetGpuInstanceProfileInfo(profile.GetInfo().GIProfileID)
		if result != nvml.SUCCESS {
			return nil, result
		}
		profiles[profile.String()] = info
	}
	return profiles, nil
}

func judge(gpu nvml.Device, profiles map[string]nvml.GpuInstanceProfileInfo, layout string) (string, error) {
	var possible [][]nvml.GpuInstancePlacement
	multiprocessors := uint32(0)
	for _, part := range strings.Split(layout, ",") {
		name, number, _ := strings.Cut(part, "=")
		count, err := strconv.Atoi(number)
		if err != nil || count < 0 {
			return "", fmt.Errorf("%s in %s: write PROFILE=COUNT", part, layout)
		}
		info, known := profiles[name]
		if !known {
			return "no such profile on this GPU: " + name, nil
		}
		placements, result := gpu.GetGpuInstancePossiblePlacements(&info)
		if result != nvml.SUCCESS {
			return "", result
		}
		for range count {
			possible = append(possible, placements)
			multiprocessors += info.MultiprocessorCount
		}
	}
	if !fits(possible, [memorySlices]bool{}) {
		return "does not fit", nil
	}
	return fmt.Sprintf("fits, %d SMs", multiprocessors), nil
}

// fits tries all placements, instance after instance; taken: the memory slices of those before.
func fits(possible [][]nvml.GpuInstancePlacement, taken [memorySlices]bool) bool {
	if len(possible) == 0 {
		return true
	}
	for _, placement := range possible[0] {
		if next, free := take(taken, placement); free && fits(possible[1:], next) {
			return true
		}
	}
	return false
}

func take(taken [memorySlices]bool, placement nvml.GpuInstancePlacement) ([memorySlices]bool, bool) {
	for slice := placement.Start; slice < placement.Start+placement.Size; slice++ {
		if taken[slice] {
			return taken, false
		}
		taken[slice] = true
	}
	return taken, true
}
