// dragen writes the ResourceSlices of a node with A100 GPUs (40 GB), one device a profile and placement, as NVIDIA's
// driver for Dynamic Resource Allocation publishes them. Each device consumes memory slices and multiprocessors of its
// GPU, so a scheduler can only choose devices that do not overlap. The figures are those of go-nvml's mock GPU.
//
// usage: dragen NODE GPUS
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/dgxa100"
)

const (
	driver       = "gpu.nvidia.com"
	memorySlices = 8
)

type object = map[string]any

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "dragen:", err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	if len(arguments) != 2 {
		return errors.New("usage: dragen NODE GPUS")
	}
	node := arguments[0]
	gpus, err := strconv.Atoi(arguments[1])
	if err != nil || gpus < 1 || gpus > 8 {
		return fmt.Errorf("GPUS = %s: use 1 to 8", arguments[1])
	}
	library := dgxa100.New()
	if result := library.Init(); result != nvml.SUCCESS {
		return result
	}
	var counters, devices []object
	for gpu := range gpus {
		device, result := library.DeviceGetHandleByIndex(gpu)
		if result != nvml.SUCCESS {
			return result
		}
		whole, result := device.GetGpuInstanceProfileInfo(nvml.GPU_INSTANCE_PROFILE_7_SLICE)
		if result != nvml.SUCCESS {
			return result
		}
		counters = append(counters, object{"name": setName(gpu), "counters": usage(whole, 0, memorySlices)})
		found, err := instances(device, gpu)
		if err != nil {
			return err
		}
		devices = append(devices, found...)
	}
	// Counters and the devices that consume them lie in slices of their own, of one pool.
	list := object{"apiVersion": "v1", "kind": "List", "items": []object{
		resourceSlice(node, "counters", "sharedCounters", counters),
		resourceSlice(node, "devices", "devices", devices),
	}}
	return json.NewEncoder(os.Stdout).Encode(list)
}

// instances lists the GPU instances that can be made on an empty GPU.
func instances(device nvml.Device, gpu int) ([]object, error) {
	var found []object
	for profile := range nvml.GPU_INSTANCE_PROFILE_COUNT {
		info, result := device.GetGpuInstanceProfileInfo(profile)
		// The first revision of one slice is the same slice with media engines.
		if result == nvml.ERROR_NOT_SUPPORTED || profile == nvml.GPU_INSTANCE_PROFILE_1_SLICE_REV1 {
			continue
		}
		if result != nvml.SUCCESS {
			return nil, result
		}
		placements, result := device.GetGpuInstancePossiblePlacements(&info)
		if result != nvml.SUCCESS {
			return nil, result
		}
		name := fmt.Sprintf("%dg.%dgb", info.SliceCount, (info.MemorySizeMB+1023)/1024)
		for _, placement := range placements {
			found = append(found, object{
				"name": fmt.Sprintf("gpu-%d-mig-%s-%d", gpu, strings.ReplaceAll(name, ".", ""), placement.Start),
				"attributes": object{
					"type":        object{"string": "mig"},
					"profile":     object{"string": name},
					"parentIndex": object{"int": gpu},
				},
				"capacity": object{"memory": object{"value": fmt.Sprintf("%dMi", info.MemorySizeMB)}},
				"consumesCounters": []object{
					{"counterSet": setName(gpu), "counters": usage(info, placement.Start, placement.Size)},
				},
			})
		}
	}
	return found, nil
}

func setName(gpu int) string { return fmt.Sprintf("gpu-%d", gpu) }

// usage counts the multiprocessors of a profile, and the memory slices from start on.
func usage(info nvml.GpuInstanceProfileInfo, start, size uint32) object {
	counters := object{"multiprocessors": object{"value": fmt.Sprint(info.MultiprocessorCount)}}
	for slice := start; slice < start+size; slice++ {
		counters[fmt.Sprintf("memory-slice-%d", slice)] = object{"value": "1"}
	}
	return counters
}

func resourceSlice(node, suffix, field string, content []object) object {
	return object{
		"apiVersion": "resource.k8s.io/v1",
		"kind":       "ResourceSlice",
		"metadata":   object{"name": node + "-" + suffix},
		"spec": object{
			"driver":   driver,
			"nodeName": node,
			"pool":     object{"name": node, "generation": 1, "resourceSliceCount": 2},
			field:      content,
		},
	}
}
